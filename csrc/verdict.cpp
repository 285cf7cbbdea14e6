#include "verdict.hpp"

#include <signal.h>
#include <sys/wait.h>

#include <algorithm>

#include "memory_file.hpp"

namespace rlef {
namespace {

constexpr auto kCheckerFunction = "check";

struct BadEnding {
    Verdict verdict;
    StoppedBy stopped_by;
};

/// The verdict that needs no look at the output. Empty when the program ended well.
std::optional<BadEnding> bad_ending(const Report& report, const Limits& limits, std::int64_t bare_memory,
                                    std::int64_t output_bytes) {
    const bool signalled = WIFSIGNALED(report.wait_status);
    const int signal = signalled ? WTERMSIG(report.wait_status) : 0;
    const BadEnding out_of_memory{Verdict::OutOfMemory, StoppedBy::MemoryLimit};
    if (signal == SIGSYS) return BadEnding{Verdict::Security, StoppedBy::SystemCallFilter};
    if (signal == SIGXFSZ || output_bytes > limits.output_bytes)
        return BadEnding{Verdict::OutputLimit, StoppedBy::OutputLimit};
    if (report.peak_memory_bytes > bare_memory + limits.memory_bytes) return out_of_memory;
    if (report.stopped == Report::Stopped::CpuTime || signal == SIGXCPU || report.cpu_ns > limits.cpu_ns) {
        return BadEnding{Verdict::Timeout, StoppedBy::CpuLimit};
    }
    if (report.stopped == Report::Stopped::WallTime) return BadEnding{Verdict::Timeout, StoppedBy::WallLimit};
    if (signalled || WEXITSTATUS(report.wait_status) != 0) {
        return report.memory_error ? out_of_memory : BadEnding{Verdict::Exception, StoppedBy::Nothing};
    }
    return std::nullopt;
}

}  // namespace

void note_status(Outcome& outcome, int wait_status) {
    if (WIFSIGNALED(wait_status)) {
        outcome.signal = WTERMSIG(wait_status);
    } else {
        outcome.exit_code = WEXITSTATUS(wait_status);
    }
}

void note_end_at_memory_limit(Outcome& outcome) {
    outcome.verdict = Verdict::OutOfMemory;
    outcome.stopped_by = StoppedBy::MemoryLimit;
}

void cut_output(Outcome& outcome, const Limits& limits) {
    const auto kept = static_cast<std::size_t>(limits.kept_output_bytes);
    if (outcome.out.size() > kept) outcome.out.resize(kept);
}

Outcome judge(const Report& report, const Streams& streams, const Job& job, const TestCase& test,
              std::int64_t bare_memory) {
    Outcome outcome;
    note_status(outcome, report.wait_status);
    outcome.cpu_ns = report.cpu_ns;
    outcome.wall_ns = report.wall_ns;
    outcome.peak_memory_bytes = report.peak_memory_bytes;
    const auto kept = static_cast<std::size_t>(job.limits.kept_output_bytes);
    const auto out_size = size_of(streams.out);
    const auto err_size = size_of(streams.err);
    const auto most_output = static_cast<std::int64_t>(std::max(out_size, err_size));
    const auto ending = bad_ending(report, job.limits, bare_memory, most_output);
    outcome.out = read_range(streams.out, 0, ending ? std::min(kept, out_size) : out_size);
    if (ending) {
        outcome.verdict = ending->verdict;
        outcome.stopped_by = ending->stopped_by;
    } else {
        const bool accepted = !job.checker.empty() ||  // for the time being
                              outputs_match(job.judge, test.expected_output, outcome.out);
        outcome.verdict = accepted ? Verdict::Passed : Verdict::WrongOutput;
        if (job.checker.empty()) cut_output(outcome, job.limits);
    }
    outcome.out_truncated = out_size > kept;
    outcome.err = read_range(streams.err, err_size - std::min(kept, err_size), err_size);
    outcome.err_truncated = err_size > kept;
    if (streams.files && size_of(streams.files) > 0) {
        outcome.files = decode_files(read_range(streams.files, 0, size_of(streams.files)));
    }
    return outcome;
}

Outcome not_compiled(const Message<Report>& report, const Limits& limits) {
    Outcome outcome;
    outcome.verdict = report.header.syntax_error   ? Verdict::SyntaxError
                      : report.header.memory_error ? Verdict::OutOfMemory
                                                   : Verdict::Exception;
    if (outcome.verdict == Verdict::OutOfMemory) outcome.stopped_by = StoppedBy::MemoryLimit;
    outcome.exit_code = 1;
    const auto kept = std::min(report.text.size(), static_cast<std::size_t>(limits.kept_output_bytes));
    outcome.err = report.text.substr(report.text.size() - kept);
    outcome.err_truncated = kept < report.text.size();
    return outcome;
}

std::shared_ptr<Check> check_of(const Job& job, const std::vector<Outcome>& outcomes) {
    if (job.checker.empty()) return nullptr;
    const auto check = std::make_shared<Check>();
    const auto* const function = job.checker_kind == ProgramKind::Python ? kCheckerFunction : "";
    check->job = {job.checker_kind, job.checker, function, {}, job.checker_limits, false, {}, {}, {}, {}};
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
        if (outcomes[i].verdict != Verdict::Passed) continue;
        check->tests.push_back(i);
        check->job.tests.push_back(job.tests[i]);
        check->outputs.push_back(outcomes[i].out);
    }
    check->outcomes.resize(check->tests.size());
    return check->tests.empty() ? nullptr : check;
}

std::optional<bool> word_of(ProgramKind kind, const Outcome& checker) {
    if (checker.stopped_by != StoppedBy::Nothing || !checker.exit_code) return std::nullopt;
    if (kind == ProgramKind::Command) {
        constexpr int kWrongAnswer = 1, kPresentationError = 2, kDirt = 4, kUnexpectedEnd = 8;
        const int status = *checker.exit_code;
        if (status == 0) return true;
        for (const int wrong : {kWrongAnswer, kPresentationError, kDirt, kUnexpectedEnd}) {
            if (status == wrong) return false;
        }
        return std::nullopt;
    }
    if (*checker.exit_code == 0 && checker.out == "true\n") return true;
    if (*checker.exit_code == 0 && checker.out == "false\n") return false;
    return std::nullopt;
}

std::string misconduct(ProgramKind kind, const Outcome& checker) {
    if (checker.signal) return "it was ended by signal " + std::to_string(*checker.signal);
    const auto status = "its exit status is " + std::to_string(checker.exit_code.value_or(0));
    const auto error = last_line(checker.err);
    if (kind == ProgramKind::Command) return error.empty() ? status : status + ": " + error;
    if (checker.exit_code == 0) return "it must return True or False, not " + last_line(checker.out);
    return error.empty() ? status : error;
}

void skip_after_failure(std::vector<Outcome>& outcomes) {
    const auto failed = std::find_if(outcomes.begin(), outcomes.end(),
                                     [](const auto& outcome) { return outcome.verdict != Verdict::Passed; });
    if (failed != outcomes.end()) std::fill(std::next(failed), outcomes.end(), Outcome{});
}

std::string last_line(std::string text) {
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text.substr(text.rfind('\n') + 1);
}

}  // namespace rlef
