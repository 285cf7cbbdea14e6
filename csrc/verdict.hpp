#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "job.hpp"
#include "message.hpp"
#include "unique_fd.hpp"

// From reports to outcomes: what the kernel said of a test, and what is in its streams.
namespace rlef {

/// Where one test writes.
struct Streams {
    UniqueFd out;
    UniqueFd err;
    UniqueFd files;  // of a command: what it left
};

/// `bare_memory` is what a worker holds before it has seen a program. Throws std::system_error.
Outcome judge(const Report& report, const Streams& streams, const Job& job, const TestCase& test,
              std::int64_t bare_memory);

/// What every test of a program says that could not be compiled.
Outcome not_compiled(const Message<Report>& report, const Limits& limits);

void note_status(Outcome& outcome, int wait_status);
void note_end_at_memory_limit(Outcome& outcome);
/// To as much as a result keeps.
void cut_output(Outcome& outcome, const Limits& limits);
void skip_after_failure(std::vector<Outcome>& outcomes);

/// What the job's checker has to look at; null when the job has none, or no test that ended well.
std::shared_ptr<Check> check_of(const Job& job, const std::vector<Outcome>& outcomes);
/// Whether a checker accepts; empty when it said neither yes nor no. A command speaks by its exit status, as
/// programs made with testlib do.
std::optional<bool> word_of(ProgramKind kind, const Outcome& checker);
/// What a checker did that said neither yes nor no.
std::string misconduct(ProgramKind kind, const Outcome& checker);

std::string last_line(std::string text);

}  // namespace rlef
