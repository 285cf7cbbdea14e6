#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "command.hpp"
#include "judge.hpp"
#include "limits.hpp"

namespace rlef {

enum class Verdict {
    Passed,
    WrongOutput,
    Exception,
    Timeout,
    OutOfMemory,
    OutputLimit,
    SyntaxError,
    Security,
    Skipped,
};

/// What ended a program that did not end of itself.
enum class StoppedBy { Nothing, SystemCallFilter, CpuLimit, WallLimit, MemoryLimit, OutputLimit };

struct TestCase {
    std::string input;
    std::string expected_output;
};

/// The two kinds of programs; each has its workers.
enum class ProgramKind { Python, Command };

/// One program and the tests to run it on.
struct Job {
    ProgramKind kind;
    std::string program;   // the source, or the encoded command
    std::string function;  // to call with the arguments in a test's input; empty: the program is a script
    std::vector<TestCase> tests;
    Limits limits;
    bool stop_at_first_failure;
    Judge judge;
    ProgramKind checker_kind;
    std::string checker;  // judges instead: a program's function `check`, or a command; empty: none
    Limits checker_limits;
};

/// One program on one test.
struct Outcome {
    Verdict verdict = Verdict::Skipped;
    StoppedBy stopped_by = StoppedBy::Nothing;
    std::optional<int> exit_code;
    std::optional<int> signal;
    std::string out;  // standard output: its beginning
    std::string err;  // standard error: its end
    bool out_truncated = false;
    bool err_truncated = false;
    std::int64_t cpu_ns = 0;
    std::int64_t wall_ns = 0;
    std::int64_t peak_memory_bytes = 0;
    std::vector<File> files;  // what a command left that was asked for
};

/// A checker, run on the outputs of a job's tests that ended well.
struct Check {
    Job job;                           // the checker, with the inputs and expected outputs
    std::vector<std::string> outputs;  // per test of `job`
    std::vector<std::size_t> tests;    // their numbers in the job that is checked
    std::vector<Outcome> outcomes;
};

}  // namespace rlef
