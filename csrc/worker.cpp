#include "worker.hpp"

#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <system_error>

#include "memory_layout.hpp"
#include "message.hpp"
#include "policy.hpp"
#include "system_calls.hpp"

namespace rlef {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kShortestSleep = 1'000'000;
constexpr rlim_t kMostCompileSeconds = 20;
constexpr rlim_t kSpareSeconds = 2;  // after which the kernel itself ends what passes its limit of CPU time
constexpr std::size_t kThreadStack = 8 << 20;
// Stacks of threads are reserved, not used: programs that ask for a large one must get it. What is really
// used counts against the memory limit.
constexpr std::int64_t kStackRoom = std::int64_t{640} << 20;
constexpr int kSetupFailed = 250;  // exit status of a test process that could not be isolated

[[noreturn]] void fail(const char* step) {
    throw std::system_error(errno, std::generic_category(), step);
}

void must(bool succeeded, const char* step) {
    if (!succeeded) fail(step);
}

std::int64_t nanoseconds(const timespec& time) {
    return time.tv_sec * kSecond + time.tv_nsec;
}
std::int64_t nanoseconds(const timeval& time) {
    return time.tv_sec * kSecond + time.tv_usec * 1000;
}

std::int64_t read_clock(clockid_t clock) {
    timespec time{};
    must(::clock_gettime(clock, &time) == 0, "clock_gettime");
    return nanoseconds(time);
}

std::int64_t cpu_time(const rusage& usage) {
    return nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime);
}

/// By getrusage: the process's CPU clock may be a tick behind when the process itself asks.
std::int64_t own_cpu_time() {
    rusage usage{};
    must(::getrusage(RUSAGE_SELF, &usage) == 0, "getrusage");
    return cpu_time(usage);
}

/// For RLIMIT_CPU, which counts whole seconds.
rlim_t cpu_seconds(std::int64_t nanoseconds) {
    return static_cast<rlim_t>(nanoseconds / kSecond) + kSpareSeconds;
}

void limit(__rlimit_resource resource, rlim_t most) {
    const rlimit both{most, most};
    must(::setrlimit(resource, &both) == 0, "setrlimit");
}

/// The soft limit only: what a program may raise again, as on any machine.
void limit_softly(__rlimit_resource resource, rlim_t most) {
    rlimit both{};
    must(::getrlimit(resource, &both) == 0, "getrlimit");
    both.rlim_cur = std::min(most, both.rlim_max);
    must(::setrlimit(resource, &both) == 0, "setrlimit");
}

/// Dies with the parent from now on; at once if it is dead already. `parent` is 0 where it cannot be seen.
void die_with(pid_t parent) {
    must(::prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0, "PR_SET_PDEATHSIG");
    if (parent && ::getppid() != parent) ::_exit(0);
}

/// What a child tells its parents, through memory that all see, before its program runs. The program cannot
/// reach it: the test process unmaps it first.
struct Beginning {
    std::atomic<bool> compiled;
    std::atomic<bool> isolated;
    std::atomic<bool> reported;         // why there is no program to run
    std::atomic<std::int64_t> cpu_ns;   // of the process when its program began
    std::atomic<std::int64_t> time_ns;  // on the monotonic clock
};

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
    worker.beginning->cpu_ns = own_cpu_time();
    worker.beginning->time_ns = read_clock(CLOCK_MONOTONIC);
    worker.beginning->isolated = true;
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

/// Waits for the test to end, and ends it when one of its clocks runs out or the supervisor is gone. The
/// clocks start when its program does.
Report::Stopped watch(int socket, pid_t test, const Limits& limits, const Beginning& beginning) {
    const UniqueFd handle(static_cast<int>(::syscall(SYS_pidfd_open, test, 0)));
    must(static_cast<bool>(handle), "pidfd_open");
    clockid_t cpu_clock;
    must(::clock_getcpuclockid(test, &cpu_clock) == 0, "clock_getcpuclockid");
    std::int64_t cpu_left = limits.cpu_ns;
    std::int64_t wall_left = limits.wall_ns;
    while (true) {
        const auto sleep = std::max(std::min(cpu_left, wall_left), kShortestSleep);
        const timespec timeout{sleep / kSecond, sleep % kSecond};
        pollfd events[] = {{handle.get(), POLLIN, 0}, {socket, 0, 0}};  // the second for its end only
        const int ready = ::ppoll(events, 2, &timeout, nullptr);
        must(ready >= 0 || errno == EINTR, "ppoll");
        if (ready > 0 && events[1].revents) ::_exit(0);  // the test dies with this process
        if (ready > 0) return Report::Stopped::No;
        if (!beginning.isolated) continue;
        cpu_left = limits.cpu_ns - (read_clock(cpu_clock) - beginning.cpu_ns);
        wall_left = limits.wall_ns - (read_clock(CLOCK_MONOTONIC) - beginning.time_ns);
        if (cpu_left <= 0 || wall_left <= 0) {
            ::kill(test, SIGKILL);
            return cpu_left <= 0 ? Report::Stopped::CpuTime : Report::Stopped::WallTime;
        }
    }
}

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

std::string read_whole(int fd) {
    struct stat facts{};
    must(::fstat(fd, &facts) == 0, "fstat");
    std::string text(static_cast<std::size_t>(facts.st_size), '\0');
    for (std::size_t at = 0; at < text.size();) {
        const ssize_t size = ::pread(fd, &text[at], text.size() - at, static_cast<off_t>(at));
        must(size > 0, "read the source");
        at += static_cast<std::size_t>(size);
    }
    return text;
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

std::int64_t statm_field(int index) {
    std::ifstream file("/proc/self/statm");
    std::int64_t pages = 0;
    for (int i = 0; i <= index; ++i) file >> pages;
    if (!file) throw std::system_error(EIO, std::generic_category(), "/proc/self/statm");
    return pages * ::sysconf(_SC_PAGESIZE);
}

void prepare_process() {
    must(::syscall(SYS_close_range, 4, ~0U, 0) == 0, "close_range");
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_MSGQUEUE, 0);
    limit(RLIMIT_MEMLOCK, 0);
    // The interpreter ignores these two.
    for (const int number : {SIGPIPE, SIGXFSZ}) must(::signal(number, SIG_DFL) != SIG_ERR, "signal");
    std::ofstream("/proc/self/oom_score_adj")
        << 1000;  // best effort: before the trainer, should the kernel choose
    // Threads would reserve as much as the main thread's stack may grow to.
    pthread_attr_t attributes;
    ::pthread_attr_init(&attributes);
    ::pthread_attr_setstacksize(&attributes, kThreadStack);
    ::pthread_setattr_default_np(&attributes);
    ::pthread_attr_destroy(&attributes);
}

/// On pages of its own that children see too.
template <typename Record>
Record* shared() {
    void* page = ::mmap(nullptr, sizeof(Record), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(page != MAP_FAILED, "mmap");
    return new (page) Record{};  // NOLINT(cppcoreguidelines-owning-memory): it lives as long as the process
}

}  // namespace

void serve(int socket, pid_t supervisor, const FileView& view, const Interpreter& interpreter) {
    prepare_process();
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
