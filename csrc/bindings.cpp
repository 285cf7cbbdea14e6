// The only file that knows the interpreter: convert, release its lock, call, convert.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "filter.hpp"
#include "isolation.hpp"
#include "judge.hpp"
#include "memory_cgroup.hpp"
#include "policy.hpp"
#include "supervisor.hpp"
#include "worker.hpp"

namespace py = pybind11;
using namespace std::chrono_literals;

namespace {

constexpr auto kSignalPatience = 50ms;  // between looks at the signals of a caller that waits

constexpr std::array kVerdictNames = {"passed",       "wrong_output", "exception", "timeout", "out_of_memory",
                                      "output_limit", "syntax_error", "security",  "skipped"};

constexpr std::array<const char*, 6> kStoppedByNames = {nullptr,      "system_call_filter", "cpu_limit",
                                                        "wall_limit", "memory_limit",       "output_limit"};

constexpr std::array<const char*, 3> kKillNames = {nullptr, "own_limit", "for_another"};

constexpr std::array<std::string_view, 6> kWhenNames = {"always",   "equal",      "one_of",
                                                        "has_bits", "lacks_bits", "is_null"};

std::string utf8(const py::handle& text) {
    const auto encoded =
        py::reinterpret_steal<py::object>(PyUnicode_AsEncodedString(text.ptr(), "utf-8", "surrogatepass"));
    if (!encoded) throw py::error_already_set();
    return {PyBytes_AS_STRING(encoded.ptr()), static_cast<std::size_t>(PyBytes_GET_SIZE(encoded.ptr()))};
}

/// Of bytes, or of text as UTF-8.
std::string bytes_of(const py::handle& input) {
    return py::isinstance<py::bytes>(input) ? input.cast<std::string>() : utf8(input);
}

py::object decoded(const std::string& bytes) {
    auto* text = PyUnicode_DecodeUTF8(bytes.data(), static_cast<Py_ssize_t>(bytes.size()), "replace");
    if (!text) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(text);
}

[[noreturn]] void throw_fault(const std::string& what) {
    const auto fault = py::module_::import("rlef_sandbox.records").attr("SandboxFault");
    PyErr_SetString(fault.ptr(), what.c_str());
    throw py::error_already_set();
}

/// What the machine refuses here is a fault as it is in the supervisor's thread.
template <typename Call>
auto or_fault(Call call) {
    try {
        return call();
    } catch (const std::system_error& error) {
        throw_fault(error.what());
    }
}

/// From a name, or from a rlef_sandbox.Tokens.
rlef::Judge judge_of(const py::handle& judge) {
    using Kind = rlef::Judge::Kind;
    if (py::hasattr(judge, "ignore_case")) {
        return {Kind::Tokens, judge.attr("absolute").cast<double>(), judge.attr("relative").cast<double>(),
                judge.attr("ignore_case").cast<bool>()};
    }
    for (const auto& [name, kind] : {std::pair{"code_contests", Kind::CodeContests},
                                     {"exact", Kind::Exact},
                                     {"tokens", Kind::Tokens},
                                     {"any", Kind::Any}}) {
        if (judge.equal(py::str(name))) return {kind, 0, 0, false};
    }
    throw py::value_error("judge is " + py::repr(judge).cast<std::string>() +
                          ": give 'code_contests', 'exact', 'tokens', 'any', Tokens(...) or, to an "
                          "executor, Checker(...)");
}

std::chrono::nanoseconds nanoseconds_of(double seconds) {
    return std::chrono::nanoseconds(static_cast<std::int64_t>(seconds * 1e9));
}

rlef::Limits limits_of(const py::handle& limits) {
    const auto nanoseconds = [&limits](const char* name) {
        return std::int64_t{nanoseconds_of(limits.attr(name).cast<double>()).count()};
    };
    const auto whole = [&limits](const char* name) { return limits.attr(name).cast<std::int64_t>(); };
    return {nanoseconds("cpu_s"),  nanoseconds("wall_limit_s"), whole("memory_bytes"), whole("processes"),
            whole("output_bytes"), whole("kept_output_bytes"),  whole("open_files"),   whole("file_bytes")};
}

std::vector<std::string> texts_of(const py::handle& values) {
    std::vector<std::string> texts;
    for (const auto& value : values) texts.push_back(utf8(value));
    return texts;
}

/// From a rlef_sandbox.Command.
std::string encoded_command(const py::handle& given, const std::vector<std::string>& more_arguments) {
    rlef::Command command;
    command.arguments = texts_of(given.attr("arguments"));
    command.arguments.insert(command.arguments.end(), more_arguments.begin(), more_arguments.end());
    command.environment = texts_of(given.attr("environment_lines"));
    std::vector<std::string> contents;
    contents.reserve(py::len(given.attr("files")));
    for (const auto& item : given.attr("files").attr("items")()) {
        const auto [name, content] = item.cast<std::pair<py::object, py::object>>();
        command.files.push_back({utf8(name), contents.emplace_back(bytes_of(content))});
    }
    command.outputs = texts_of(given.attr("outputs"));
    command.may_fork = given.attr("may_fork").cast<bool>();
    command.stack_bytes = given.attr("stack_bytes").cast<std::int64_t>();
    return rlef::encode(command);
}

struct Program {
    rlef::ProgramKind kind;
    std::string text;
};

Program program_of(const py::handle& program, const std::vector<std::string>& more_arguments) {
    if (!py::hasattr(program, "arguments")) return {rlef::ProgramKind::Python, utf8(program)};
    return {rlef::ProgramKind::Command, encoded_command(program, more_arguments)};
}

rlef::Job job_of(const py::handle& job, const py::handle& default_limits) {
    const py::object own_limits = job.attr("limits");
    const py::object judge = job.attr("judge");
    const bool has_checker = py::hasattr(judge, "program");
    const auto limits = limits_of(own_limits.is_none() ? default_limits : own_limits);
    auto program = program_of(job.attr("program"), {});
    auto checker = has_checker ? program_of(judge.attr("program"),
                                            {rlef::kCheckerArguments.begin(), rlef::kCheckerArguments.end()})
                               : Program{};
    rlef::Job result{program.kind,
                     std::move(program.text),
                     utf8(job.attr("function")),
                     {},
                     limits,
                     job.attr("stop_at_first_failure").cast<bool>(),
                     has_checker ? rlef::Judge{} : judge_of(judge),
                     checker.kind,
                     std::move(checker.text),
                     has_checker ? limits_of(judge.attr("limits")) : limits};
    for (const auto& test : job.attr("tests")) {
        result.tests.push_back({bytes_of(test.attr("input")), utf8(test.attr("expected_output"))});
    }
    return result;
}

/// The arguments of rlef_sandbox.Result, in its order.
py::tuple outcome_tuple(const rlef::Outcome& outcome) {
    const py::dict files;
    for (const auto& [name, content] : outcome.files) files[py::str(name)] = py::bytes(content);
    return py::make_tuple(kVerdictNames[static_cast<std::size_t>(outcome.verdict)], outcome.exit_code,
                          outcome.signal, decoded(outcome.out), decoded(outcome.err), outcome.out_truncated,
                          outcome.err_truncated, static_cast<double>(outcome.cpu_ns) / 1e9,
                          static_cast<double>(outcome.wall_ns) / 1e9, outcome.peak_memory_bytes,
                          kStoppedByNames[static_cast<std::size_t>(outcome.stopped_by)], files);
}

/// Calls `done(patience)` without the interpreter's lock until it is true. Throws what a signal handler
/// raises.
template <typename Done>
void wait_interruptibly(Done done) {
    while (true) {
        {
            const py::gil_scoped_release released;
            if (done(kSignalPatience)) return;
        }
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    }
}

/// Jobs under way. What is not finished when the last reference goes is cancelled.
class Batch {
  public:
    Batch(rlef::Supervisor& supervisor, const py::sequence& jobs, const py::handle& default_limits)
        : supervisor_(supervisor) {
        std::vector<rlef::Job> work;
        for (const auto& job : jobs) work.push_back(job_of(job, default_limits));
        batch_ = std::make_shared<rlef::Batch>(std::move(work));
        supervisor_.submit(batch_);
    }
    ~Batch() { cancel(); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    void wait(bool for_all) {
        using Until = rlef::Supervisor::Until;
        const auto until = for_all ? Until::Over : Until::AnyFinished;
        wait_interruptibly([&](auto patience) { return supervisor_.wait(*batch_, until, patience); });
    }

    std::vector<std::pair<std::size_t, py::list>> take() {
        const auto fault = supervisor_.batch_fault(*batch_);
        if (!fault.empty()) throw_fault(fault);
        std::vector<std::pair<std::size_t, py::list>> taken;
        for (const auto& [index, outcomes] : supervisor_.take_finished(*batch_)) {
            py::list of_job;
            for (const auto& outcome : outcomes) of_job.append(outcome_tuple(outcome));
            taken.emplace_back(index, of_job);
        }
        return taken;
    }

    bool is_over() { return supervisor_.is_over(*batch_); }
    int fileno() {
        return or_fault([&] { return supervisor_.notifier(*batch_); });
    }
    void cancel() { supervisor_.cancel(batch_); }

  private:
    rlef::Supervisor& supervisor_;
    std::shared_ptr<rlef::Batch> batch_;
};

std::vector<std::pair<std::string, int>> layers(rlef::Supervisor& supervisor) {
    const auto errors = supervisor.layers();
    std::vector<std::pair<std::string, int>> named;
    for (std::size_t i = 0; i < rlef::kLayers; ++i) named.emplace_back(rlef::kLayerNames[i], errors[i]);
    return named;
}

/// A worker's life. `compile(bytes)` returns a program or a (text, is_syntax_error, is_memory_error) tuple;
/// `run(program, function)` returns (exit code, whether an uncaught MemoryError ended it).
void serve(int socket, int supervisor, const rlef::FileView& view, const py::function& compile,
           const py::function& run_program) {
    py::object program;
    rlef::Interpreter interpreter;
    interpreter.before_fork = PyOS_BeforeFork;
    interpreter.after_fork_in_parent = PyOS_AfterFork_Parent;
    interpreter.after_fork_in_child = PyOS_AfterFork_Child;
    interpreter.compile = [&](std::string_view source) {
        auto compiled = compile(py::bytes(source.data(), source.size()));
        if (py::isinstance<py::tuple>(compiled)) {
            const auto [text, syntax, memory] = compiled.cast<std::tuple<std::string, bool, bool>>();
            // NOLINTNEXTLINE(bugprone-std-exception-baseclass): part of what Interpreter promises
            throw rlef::CompileError{text, syntax, memory};
        }
        program = std::move(compiled);
    };
    interpreter.run = [&](std::string_view function) {
        const auto ending = run_program(program, py::str(function.data(), function.size()));
        const auto [exit_code, memory_error] = ending.cast<std::pair<int, bool>>();
        return rlef::Ending{exit_code, memory_error};
    };
    rlef::serve(socket, supervisor, view, interpreter);
}

// ---- policies, as tests read and write them

using RuleTuple = std::tuple<std::uint32_t, std::uint32_t, std::string, unsigned, std::uint32_t,
                             std::vector<std::uint32_t>, std::uint32_t>;
using PolicyTuple =
    std::tuple<std::vector<RuleTuple>, std::uint32_t, std::uint32_t, std::uint32_t, std::uint32_t>;
using Instruction = std::tuple<std::uint16_t, std::uint8_t, std::uint8_t, std::uint32_t>;

rlef::Architecture architecture_of(const std::string& name) {
    if (name == "x86_64") return rlef::Architecture::X86_64;
    if (name == "aarch64") return rlef::Architecture::Aarch64;
    throw py::value_error("architecture is '" + name + "': give 'x86_64' or 'aarch64'");
}

rlef::When when_of(const std::string& name) {
    const auto* const found = std::find(kWhenNames.begin(), kWhenNames.end(), name);
    if (found == kWhenNames.end()) throw py::value_error("when is '" + name + "'");
    return static_cast<rlef::When>(found - kWhenNames.begin());
}

PolicyTuple policy_tuple(const rlef::Policy& policy) {
    std::vector<RuleTuple> rules;
    for (const auto& rule : policy.rules) {
        rules.emplace_back(rule.number, rule.action, kWhenNames.at(static_cast<std::size_t>(rule.when)),
                           rule.argument, rule.value, rule.values, rule.otherwise);
    }
    return {rules, policy.unnamed, policy.beyond, policy.first_alien, policy.architecture};
}

std::vector<Instruction> instructions(const std::vector<sock_filter>& code) {
    std::vector<Instruction> result;
    for (const auto& step : code) result.emplace_back(step.code, step.jt, step.jf, step.k);
    return result;
}

std::vector<Instruction> compile_policy(const PolicyTuple& tuple) {
    const auto& [rules, unnamed, beyond, first_alien, architecture] = tuple;
    rlef::Policy policy{{}, unnamed, beyond, first_alien, architecture};
    for (const auto& [number, action, when, argument, value, values, otherwise] : rules) {
        policy.rules.push_back({number, action, when_of(when), argument, value, values, otherwise});
    }
    return instructions(rlef::compile(policy));
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "The compiled core of rlef_sandbox.";

    module.def(
        "outputs_match",
        [](const py::str& expected, const py::str& output, const py::object& judge) {
            return rlef::outputs_match(judge_of(judge), utf8(expected), utf8(output));
        },
        py::arg("expected"), py::arg("output"), py::arg("judge"));

    module.def(
        "serve",
        [](int socket, int supervisor, std::vector<std::string> readable, std::vector<std::string> hidden,
           const py::function& compile, const py::function& run_program) {
            serve(socket, supervisor, {std::move(readable), std::move(hidden)}, compile, run_program);
        },
        py::arg("socket"), py::arg("supervisor"), py::arg("readable"), py::arg("hidden"), py::arg("compile"),
        py::arg("run"));

    module.def("layer_names", [] { return rlef::kLayerNames; });
    module.def(
        "worker_policy",
        [](const std::string& architecture) {
            return policy_tuple(rlef::worker_policy(architecture_of(architecture)));
        },
        py::arg("architecture"));
    module.def(
        "command_policy",
        [](bool may_fork, bool may_write, const std::string& architecture) {
            return policy_tuple(rlef::command_policy({may_fork, may_write}, architecture_of(architecture)));
        },
        py::arg("may_fork"), py::arg("may_write"), py::arg("architecture"));
    module.def(
        "test_policy",
        [](int own_pid, const std::string& architecture, bool may_fork) {
            return policy_tuple(rlef::test_policy(own_pid, architecture_of(architecture), may_fork));
        },
        py::arg("own_pid"), py::arg("architecture"), py::arg("may_fork"));
    module.def(
        "test_filter",
        [](int own_pid, const std::string& architecture) {
            return instructions(rlef::TestFilter(architecture_of(architecture)).of(own_pid));
        },
        py::arg("own_pid"), py::arg("architecture"));
    module.def("compile_policy", compile_policy, py::arg("policy"));

    py::class_<rlef::MemoryCgroup>(module, "MemoryCgroup")  // as tests use it
        .def(py::init<std::string>(), py::arg("folder"))
        .def("enter", &rlef::MemoryCgroup::enter, py::arg("process"))
        .def("note_rest", &rlef::MemoryCgroup::note_rest)
        .def(
            "limit",
            [](rlef::MemoryCgroup& cgroup, const py::object& limits) { cgroup.limit(limits_of(limits), 0); },
            py::arg("limits"))
        .def("take_kill", [](rlef::MemoryCgroup& cgroup) {
            return kKillNames.at(static_cast<std::size_t>(cgroup.take_kill()));
        });

    py::class_<Batch>(module, "Batch")
        .def("wait", &Batch::wait, py::arg("for_all"))
        .def("take", &Batch::take)
        .def("is_over", &Batch::is_over)
        .def("fileno", &Batch::fileno)
        .def("cancel", &Batch::cancel);

    py::class_<rlef::Supervisor>(module, "Supervisor")
        .def(py::init([](std::vector<std::string> for_python, std::vector<std::string> for_commands,
                         const std::vector<std::string>& environment, unsigned workers,
                         std::uint32_t allowed_missing, const std::string& memory_cgroup,
                         double report_patience_s) {
                 rlef::WorkerCommand python{std::move(for_python), environment};
                 rlef::WorkerCommand commands{std::move(for_commands), environment};
                 return or_fault([&] {
                     return std::make_unique<rlef::Supervisor>(std::move(python), std::move(commands),
                                                               workers, allowed_missing, memory_cgroup,
                                                               nanoseconds_of(report_patience_s));
                 });
             }),
             py::arg("for_python"), py::arg("for_commands"), py::arg("environment"), py::arg("workers"),
             py::arg("allowed_missing"), py::arg("memory_cgroup"), py::arg("report_patience_s") = 60.0)
        .def("wait_until_ready",
             [](rlef::Supervisor& supervisor) {
                 wait_interruptibly([&](auto patience) { return supervisor.wait_until_ready(patience); });
                 const auto fault = supervisor.fault();
                 if (!fault.empty()) throw_fault(fault);
             })
        .def(
            "submit",
            [](rlef::Supervisor& supervisor, const py::sequence& jobs, const py::object& default_limits) {
                return std::make_unique<Batch>(supervisor, jobs, default_limits);
            },
            py::arg("jobs"), py::arg("default_limits"), py::keep_alive<0, 1>())
        .def("layers", layers)
        .def("worker_pids", &rlef::Supervisor::worker_pids)
        .def("restarts", &rlef::Supervisor::restarts)
        .def("take_tally",
             [](rlef::Supervisor& supervisor) {
                 const auto tally = supervisor.take_tally();
                 return py::make_tuple(tally.programs, tally.restarts, tally.retries,
                                       std::chrono::duration<double>(tally.longest).count(),
                                       std::chrono::duration<double>(tally.alone).count());
             })
        .def("close", &rlef::Supervisor::close, py::call_guard<py::gil_scoped_release>());
}
