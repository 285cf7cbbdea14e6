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
#include <fstream>
#include <system_error>

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

// How a process of ours ends. What a program exits with is seen by its solution process alone.
constexpr int kSetupFailed = 1;
constexpr int kCompileTooSlow = 2;

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

rlim_t cpu_seconds(const Limits& limits) {
    return static_cast<rlim_t>(limits.cpu_ns / kSecond) + kSpareSeconds;
}

/// Dies with the parent from now on; at once if it is dead already. `parent` is 0 where it cannot be seen.
void die_with(pid_t parent) {
    must(::prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0, "PR_SET_PDEATHSIG");
    if (parent && ::getppid() != parent) ::_exit(0);
}

/// What a child tells its parent through memory that both see.
struct Notes {
    bool compiled;
    bool memory_error;
};

/// What one worker knows and its children inherit.
struct Worker {
    int socket;
    Isolation isolation;
    const Interpreter& interpreter;
    std::int64_t bare_address_space;
    std::int64_t bare_memory;
    Notes* notes;
};

/// Says so and ends the process. The supervisor takes it for the machine's fault.
[[noreturn]] void give_up(int socket, const std::system_error& error) {
    Report report{};
    report.kind = Report::Kind::CannotIsolate;
    send_message(socket, report, error.what(), {});
    ::_exit(kSetupFailed);
}

// ---- test process

void isolate_test(int socket, const std::vector<UniqueFd>& streams, const Limits& limits, pid_t solution) {
    die_with(solution);
    for (int target = 0; target < 3; ++target) {
        must(::dup2(streams[static_cast<std::size_t>(target)].get(), target) == target, "dup2");
    }
    must(::syscall(SYS_close_range, socket + 1, ~0U, 0) == 0, "close_range");
    limit_softly(RLIMIT_CPU, cpu_seconds(limits));
    const int error = install(compile(test_policy(::getpid())));
    if (error) throw std::system_error(error, std::generic_category(), "seccomp");
    ::close(socket);  // last: a step that fails is told through it
}

[[noreturn]] void test_main(const Worker& worker, const std::vector<UniqueFd>& streams, const Limits& limits,
                            pid_t solution) {
    try {
        isolate_test(worker.socket, streams, limits, solution);
    } catch (const std::system_error& error) {
        give_up(worker.socket, error);
    }
    worker.interpreter.after_fork_in_child();
    const auto ending = worker.interpreter.run();
    worker.notes->memory_error = ending.memory_error;
    ::_exit(ending.exit_code);
}

// ---- solution process

/// Waits for the test to end, and ends it when one of its clocks runs out or the supervisor is gone.
Report::Stopped watch(int socket, pid_t test, const Limits& limits, std::int64_t started) {
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
        cpu_left = limits.cpu_ns - read_clock(cpu_clock);
        wall_left = limits.wall_ns - (read_clock(CLOCK_MONOTONIC) - started);
        if (cpu_left <= 0 || wall_left <= 0) {
            ::kill(test, SIGKILL);
            return cpu_left <= 0 ? Report::Stopped::CpuTime : Report::Stopped::WallTime;
        }
    }
}

Report run_test(const Worker& worker, const std::vector<UniqueFd>& streams, const Limits& limits) {
    worker.notes->memory_error = false;
    const pid_t solution = ::getpid();
    const auto started = read_clock(CLOCK_MONOTONIC);
    worker.interpreter.before_fork();
    const pid_t test = ::fork();
    if (test == 0) test_main(worker, streams, limits, solution);
    const int fork_error = errno;
    worker.interpreter.after_fork_in_parent();
    if (test < 0) throw std::system_error(fork_error, std::generic_category(), "fork");

    Report report{};
    report.kind = Report::Kind::Finished;
    report.stopped = watch(worker.socket, test, limits, started);
    rusage usage{};
    must(::wait4(test, &report.wait_status, 0, &usage) == test, "wait4");
    report.wall_ns = read_clock(CLOCK_MONOTONIC) - started;
    report.cpu_ns = nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime);
    report.peak_memory_bytes = static_cast<std::int64_t>(usage.ru_maxrss) * 1024;
    report.memory_error = worker.notes->memory_error;
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
void limit_resources(const Worker& worker, const Limits& limits) {
    limit(RLIMIT_AS, static_cast<rlim_t>(worker.bare_address_space + limits.memory_bytes + kStackRoom));
    limit(RLIMIT_FSIZE, static_cast<rlim_t>(limits.output_bytes));
    limit(RLIMIT_NOFILE, static_cast<rlim_t>(limits.open_files));
    if (worker.isolation.count_processes) {
        limit(RLIMIT_NPROC, static_cast<rlim_t>(limits.processes + worker.isolation.processes_of_ours));
    }
}

/// Ends this process when the compiler takes too long. A handler: as pid 1 of its namespace the process is
/// spared by every signal that it leaves to the kernel.
void limit_compile_time(const Limits& limits) {
    ::signal(SIGXCPU, [](int) { ::_exit(kCompileTooSlow); });
    limit_softly(RLIMIT_CPU, std::min(kMostCompileSeconds, cpu_seconds(limits)));
}

/// Each test has a limit of its own.
void lift_compile_time() {
    limit_softly(RLIMIT_CPU, RLIM_INFINITY);
    ::signal(SIGXCPU, SIG_DFL);
}

bool compile_program(const Worker& worker, std::string_view source) {
    try {
        worker.interpreter.compile(source);
    } catch (const CompileError& error) {
        Report report{};
        report.kind = Report::Kind::NotCompiled;
        report.syntax_error = error.syntax;
        report.memory_error = error.memory;
        send_message(worker.socket, report, error.text, {});
        return false;
    }
    worker.notes->compiled = true;
    return true;
}

[[noreturn]] void solution_main(const Worker& worker, Message<Request> program, pid_t parent) {
    try {
        drop_privileges(worker.isolation);
        die_with(parent);  // after the change of user, which forgets it
        // The compiler's warnings would fill the worker's log, a program at a time.
        must(::dup2(STDOUT_FILENO, STDERR_FILENO) == STDERR_FILENO, "dup2");
        limit_resources(worker, program.header.limits);
        limit_compile_time(program.header.limits);
        worker.interpreter.after_fork_in_child();
        const auto source = read_whole(program.fds.at(0).get());
        program.fds.clear();
        if (!compile_program(worker, source)) ::_exit(0);
        lift_compile_time();
        while (auto request = receive_request(worker.socket)) {
            if (request->header.kind != Request::Kind::Test) ::_exit(0);
            const auto report = run_test(worker, request->fds, program.header.limits);
            if (!send_message(worker.socket, report, {}, {})) break;
        }
    } catch (const std::system_error& error) {
        give_up(worker.socket, error);
    }
    ::_exit(0);
}

// ---- worker

/// Forks the solution process, in a pid namespace of its own where there are any, and waits for its end.
void run_program(const Worker& worker, Message<Request> program) {
    *worker.notes = {};
    const pid_t parent = worker.isolation.pid_namespace ? 0 : ::getpid();
    worker.interpreter.before_fork();
    // Not fork(): only the system call takes the flag. This process has one thread, so there is nothing to
    // tidy up.
    const long namespaces = worker.isolation.pid_namespace ? CLONE_NEWPID : 0;
    const long solution = ::syscall(SYS_clone, namespaces | SIGCHLD, 0, 0, 0, 0);
    if (solution == 0) solution_main(worker, std::move(program), parent);
    const int clone_error = errno;
    worker.interpreter.after_fork_in_parent();
    if (solution < 0) throw std::system_error(clone_error, std::generic_category(), "clone");

    int status = 0;
    must(::waitpid(static_cast<pid_t>(solution), &status, 0) == solution, "waitpid");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
    Report report{};
    report.kind = Report::Kind::Died;
    report.wait_status = status;
    const bool slow = WIFEXITED(status) && WEXITSTATUS(status) == kCompileTooSlow;
    report.stopped = slow ? Report::Stopped::CpuTime : Report::Stopped::No;
    report.compiled = worker.notes->compiled;
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
    for (const int number : {SIGPIPE, SIGXFSZ}) ::signal(number, SIG_DFL);  // the interpreter ignores them
    std::ofstream("/proc/self/oom_score_adj")
        << 1000;  // best effort: before the trainer, should the kernel choose
    // Threads would reserve as much as the main thread's stack may grow to.
    pthread_attr_t attributes;
    ::pthread_attr_init(&attributes);
    ::pthread_attr_setstacksize(&attributes, kThreadStack);
    ::pthread_setattr_default_np(&attributes);
    ::pthread_attr_destroy(&attributes);
}

Notes* shared_notes() {
    void* page = ::mmap(nullptr, sizeof(Notes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(page != MAP_FAILED, "mmap");
    return static_cast<Notes*>(page);
}

}  // namespace

void serve(int socket, pid_t supervisor, const FileView& view, const Interpreter& interpreter) {
    prepare_process();
    Worker worker{socket, {}, interpreter, statm_field(0), statm_field(1), shared_notes()};
    try {
        worker.isolation = isolate(view);
        die_with(supervisor);
        const int error = install(compile(worker_policy()));
        if (error) throw std::system_error(error, std::generic_category(), "seccomp");
    } catch (const std::system_error& error) {
        give_up(socket, error);
    }
    ::malloc_trim(0);  // leaves the heap in order, or every child would tidy up its own copy
    Report ready{};
    ready.kind = Report::Kind::Ready;
    ready.bare_memory_bytes = worker.bare_memory;
    ready.layers = worker.isolation.errors;
    if (!send_message(socket, ready, {}, {})) return;
    while (auto request = receive_request(socket)) {
        // Tests and ends that a dead solution process left unread are passed over.
        if (request->header.kind == Request::Kind::Program) run_program(worker, std::move(*request));
    }
}

}  // namespace rlef
