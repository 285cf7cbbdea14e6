#include "worker.hpp"

#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <system_error>

#include "memory_layout.hpp"
#include "message.hpp"
#include "must.hpp"
#include "policy.hpp"
#include "process.hpp"
#include "system_calls.hpp"

namespace rlef {
namespace {

constexpr rlim_t kMostCompileSeconds = 20;
constexpr std::size_t kThreadStack = 8 << 20;

/// The one thing that a program may say of itself.
struct Confession {
    std::atomic<bool> memory_error;
};

/// What one worker knows and its children inherit.
struct Worker {
    int socket;
    Isolation isolation;
    const Interpreter& interpreter;
    std::int64_t bare_address_space;
    std::int64_t bare_memory;
    Beginning* beginning;
    Confession* confession;
    TestFilter* test_filter;
};

/// Tells the supervisor, or leaves the telling to the parent, where the socket is closed already.
void tell(const Worker& worker, const Report& report, std::string_view text) {
    try {
        send_message(worker.socket, report, text, {});
        worker.beginning->reported = true;
    } catch (const std::system_error&) {
        worker.beginning->reported = false;
    }
}

/// Says so and ends the process. The supervisor takes it for the machine's fault.
[[noreturn]] void give_up(const Worker& worker, const std::system_error& error) {
    Report report{};
    report.kind = Report::Kind::CannotIsolate;
    tell(worker, report, error.what());
    ::_exit(kSetupFailed);
}

// ---- test process

void isolate_test(const Worker& worker, const std::vector<UniqueFd>& streams, const Limits& limits) {
    const int count = static_cast<int>(streams.size());
    for (int target = 0; target < count; ++target) {
        must(::dup2(streams[static_cast<std::size_t>(target)].get(), target) == target, "dup2");
    }
    must(::syscall(SYS_close_range, count, ~0U, 0) == 0, "close_range");
    limit_softly(RLIMIT_CPU, cpu_seconds(own_cpu_time() + limits.cpu_ns));
    const int error = install(worker.test_filter->of(::getpid()));
    if (error) throw std::system_error(error, std::generic_category(), "seccomp");
    begin(*worker.beginning);
    must(::munmap(worker.beginning, sizeof(Beginning)) == 0, "munmap");
}

/// What a test process does last: it runs the program that is compiled.
[[noreturn]] void run_to_the_end(const Worker& worker, std::string_view function) {
    const auto ending = worker.interpreter.run(function);
    worker.confession->memory_error = ending.memory_error;
    ::_exit(ending.exit_code);
}

[[noreturn]] void test_main(const Worker& worker, const Message<Request>& program,
                            const std::vector<UniqueFd>& streams, pid_t solution) {
    try {
        die_with(solution);
        isolate_test(worker, streams, program.header.limits);
    } catch (const std::system_error&) {
        ::_exit(kSetupFailed);
    }
    worker.interpreter.after_fork_in_child();
    run_to_the_end(worker, program.text);
}

// ---- what has a test process for a child

/// Forks a test process, which runs `body`, and waits for it. The report is of kind Died where its program
/// was never begun.
template <typename Body>
Report run_test(const Worker& worker, const Limits& limits, Body body) {
    auto& beginning = *worker.beginning;
    beginning.isolated = false;
    worker.confession->memory_error = false;
    worker.interpreter.before_fork();
    const pid_t test = ::fork();
    if (test == 0) body();
    const int fork_error = errno;
    worker.interpreter.after_fork_in_parent();
    if (test < 0) throw std::system_error(fork_error, std::generic_category(), "fork");

    Report report{};
    report.stopped = watch(worker.socket, test, limits, beginning);
    rusage usage{};
    must(::wait4(test, &report.wait_status, 0, &usage) == test, "wait4");
    report.compiled = beginning.compiled;
    report.kind = beginning.isolated ? Report::Kind::Finished : Report::Kind::Died;
    report.wall_ns = read_clock(CLOCK_MONOTONIC) - beginning.time_ns;
    report.cpu_ns = cpu_time(usage) - beginning.cpu_ns;
    report.peak_memory_bytes = static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
    report.memory_error = worker.confession->memory_error;
    return report;
}

/// Set once per program: tests inherit these, and cannot raise them.
void limit_resources(const Worker& worker, const Limits& limits, bool few_tests) {
    limit(RLIMIT_AS, static_cast<rlim_t>(worker.bare_address_space + limits.memory_bytes + kStackRoom));
    limit(RLIMIT_FSIZE, static_cast<rlim_t>(limits.output_bytes));
    limit(RLIMIT_NOFILE, static_cast<rlim_t>(limits.open_files));
    if (worker.isolation.count_processes) {
        const int of_ours = worker.isolation.processes_of_ours - (few_tests ? 1 : 0);  // no solution process
        limit(RLIMIT_NPROC, static_cast<rlim_t>(limits.processes + of_ours));
    }
    limit_softly(RLIMIT_CPU, std::min(kMostCompileSeconds, cpu_seconds(limits.cpu_ns)));
}

bool compile_program(const Worker& worker, std::string_view source) {
    try {
        worker.interpreter.compile(source);
    } catch (const CompileError& error) {
        Report report{};
        report.kind = Report::Kind::NotCompiled;
        report.syntax_error = error.syntax;
        report.memory_error = error.memory;
        tell(worker, report, error.text);
        return false;
    }
    worker.beginning->compiled = true;
    return true;
}

/// In a child of the worker: no rights, no more than the limits, and the program compiled. Leaves the process
/// when the source is no program.
void prepare_program(const Worker& worker, const Message<Request>& program, pid_t parent) {
    drop_privileges(worker.isolation);
    die_with(parent);  // after the change of user, which forgets it
    // The compiler's warnings would fill the worker's log, a program at a time.
    must(::dup2(STDOUT_FILENO, STDERR_FILENO) == STDERR_FILENO, "dup2");
    limit_resources(worker, program.header.limits, program.header.few_tests);
    worker.interpreter.after_fork_in_child();
    const auto source = read_whole(program.fds.at(0).get());
    if (!compile_program(worker, source)) ::_exit(0);
}

// ---- solution process

[[noreturn]] void solution_main(const Worker& worker, Message<Request> program, pid_t parent) {
    const auto& limits = program.header.limits;
    try {
        prepare_program(worker, program, parent);
        program.fds.clear();
        limit_softly(RLIMIT_CPU, RLIM_INFINITY);  // it forks from now on; each test has a limit of its own
        while (auto request = receive_request(worker.socket)) {
            if (request->header.kind != Request::Kind::Test) ::_exit(0);
            const pid_t solution = ::getpid();
            const auto report =
                run_test(worker, limits, [&] { test_main(worker, program, request->fds, solution); });
            if (report.kind == Report::Kind::Died) {
                errno = EPERM;
                fail("isolate a test process");
            }
            if (!send_message(worker.socket, report, {}, {})) break;
        }
    } catch (const std::system_error& error) {
        give_up(worker, error);
    }
    ::_exit(0);
}

// ---- worker

/// What a process of the worker's namespace may call its parent: 0 where it does not see it.
pid_t visible_self(const Worker& worker) {
    return worker.isolation.pid_namespace ? 0 : ::getpid();
}

[[noreturn]] void compile_and_test_main(const Worker& worker, const Message<Request>& program,
                                        const std::vector<UniqueFd>& streams, pid_t parent) {
    try {
        prepare_program(worker, program, parent);
        isolate_test(worker, streams, program.header.limits);
    } catch (const std::system_error& error) {
        give_up(worker, error);
    }
    run_to_the_end(worker, program.text);
}

/// Runs each test in a process of its own that also compiles the program: for few tests the cheaper way.
void run_few_tests(const Worker& worker, const Message<Request>& program) {
    const pid_t parent = visible_self(worker);
    while (auto request = receive_request(worker.socket)) {
        if (request->header.kind != Request::Kind::Test) return;
        worker.beginning->compiled = worker.beginning->reported = false;
        const auto report = run_test(worker, program.header.limits,
                                     [&] { compile_and_test_main(worker, program, request->fds, parent); });
        if (!worker.beginning->reported) send_message(worker.socket, report, {}, {});
        if (report.kind == Report::Kind::Died) return;
    }
}

/// Forks a solution process, which compiles the program once for all its tests, and waits for its end.
void run_many_tests(const Worker& worker, Message<Request> program) {
    worker.beginning->compiled = false;
    const pid_t parent = visible_self(worker);
    worker.interpreter.before_fork();
    const pid_t solution = ::fork();
    if (solution == 0) solution_main(worker, std::move(program), parent);
    const int fork_error = errno;
    worker.interpreter.after_fork_in_parent();
    if (solution < 0) throw std::system_error(fork_error, std::generic_category(), "fork");

    int status = 0;
    must(::waitpid(solution, &status, 0) == solution, "waitpid");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
    Report report{};
    report.kind = Report::Kind::Died;
    report.wait_status = status;
    report.compiled = worker.beginning->compiled;
    send_message(worker.socket, report, {}, {});
}

/// Threads would reserve as much as the main thread's stack may grow to.
void limit_stacks_of_threads() {
    pthread_attr_t attributes;
    ::pthread_attr_init(&attributes);
    ::pthread_attr_setstacksize(&attributes, kThreadStack);
    ::pthread_setattr_default_np(&attributes);
    ::pthread_attr_destroy(&attributes);
}

}  // namespace

void serve(int socket, pid_t supervisor, const FileView& view, const Interpreter& interpreter) {
    prepare_worker();
    limit_stacks_of_threads();
    put_code_into_huge_pages();  // while /proc is there, and before memory is looked at
    TestFilter test_filter;
    Worker worker{socket,
                  {},
                  interpreter,
                  statm_field(0),
                  statm_field(1),
                  shared<Beginning>(),
                  shared<Confession>(),
                  &test_filter};
    try {
        worker.isolation = isolate(view);
        die_with(supervisor);
        const int error = install(compile(worker_policy()));
        if (error) throw std::system_error(error, std::generic_category(), "seccomp");
    } catch (const std::system_error& error) {
        give_up(worker, error);
    }
    fill_gaps_of_heap();
    Report ready{};
    ready.kind = Report::Kind::Ready;
    ready.bare_memory_bytes = worker.bare_memory;
    ready.layers = worker.isolation.errors;
    if (!send_message(socket, ready, {}, {})) return;
    while (auto request = receive_request(socket)) {
        // Tests and ends that a dead solution process left unread are passed over.
        if (request->header.kind != Request::Kind::Program) continue;
        if (request->header.few_tests) {
            run_few_tests(worker, *request);
        } else {
            run_many_tests(worker, std::move(*request));
        }
    }
}

}  // namespace rlef
