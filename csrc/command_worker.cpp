#include "command_worker.hpp"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <optional>
#include <system_error>

#include "command.hpp"
#include "message.hpp"
#include "must.hpp"
#include "policy.hpp"
#include "process.hpp"
#include "system_calls.hpp"
#include "work_folder.hpp"

namespace rlef {
namespace {

constexpr std::size_t kStreams = 3;
// Among a test's descriptors: the file for its outputs, and the input, output and expected output that a
// checker is asked about.
constexpr std::size_t kOutputsAt = 3;
constexpr std::array<std::size_t, 3> kCheckedAt = {0, 5, 4};
constexpr std::size_t kMostOfATest = 4;  // more has a checker's

/// What one worker knows and its children inherit.
struct Worker {
    int socket;
    FileView view;
    Isolation isolation;
    Beginning* beginning;
};

/// A file, mapped: what is mapped shared does not count as memory of the processes forked later.
class Mapping {
  public:
    explicit Mapping(int file)
        : size_(static_cast<std::size_t>(::lseek(file, 0, SEEK_END))),
          pages_(::mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0)) {
        must(pages_ != MAP_FAILED, "map a command");
    }
    ~Mapping() { ::munmap(pages_, size_); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;

    std::string_view bytes() const { return {static_cast<const char*>(pages_), size_}; }

  private:
    std::size_t size_;
    void* pages_;
};

void tell(const Worker& worker, Report::Kind kind, std::string_view text) {
    Report report{};
    report.kind = kind;
    send_message(worker.socket, report, text, {});
}

/// Says so and ends the process. The supervisor takes it for the machine's fault.
[[noreturn]] void give_up(const Worker& worker, const std::exception& error) {
    try {
        tell(worker, Report::Kind::CannotIsolate, error.what());
    } catch (const std::system_error&) {
        ::_exit(kSetupFailed);  // the parent says that this process died
    }
    ::_exit(kSetupFailed);
}

std::string without_dot(const std::string& path) {
    return path.rfind("./", 0) == 0 ? path.substr(2) : path;
}

std::int64_t cpu_time_of_children() {
    rusage usage{};
    must(::getrusage(RUSAGE_CHILDREN, &usage) == 0, "getrusage");
    return cpu_time(usage);
}

/// A command with its limits: what a job process runs on one test after the other.
class CommandJob {
  public:
    CommandJob(const Worker& worker, Command command, const Limits& limits)
        : worker_(worker),
          command_(std::move(command)),
          limits_(limits),
          has_folder_(holds(worker.isolation, Layer::MountNamespace)),
          filter_(compile(command_policy({command_.may_fork, limits.file_bytes > 0}))) {
        if (!has_folder_ && !command_.files.empty()) executable_ = executable_in_memory();
    }

    /// Why this machine cannot run it safely. Empty: it can.
    std::string refusal(bool is_checker) const {
        const auto lacks = [this](Layer layer) { return !holds(worker_.isolation, layer); };
        if (command_.may_fork && (lacks(Layer::PidNamespace) || !worker_.isolation.count_processes)) {
            return "this machine gives no pid namespace, or cannot count a program's processes: a command "
                   "with may_fork=True cannot be bounded";
        }
        const bool own_executable_only = command_.files.empty() || executable_;
        if (!has_folder_ && (limits_.file_bytes > 0 || is_checker || !own_executable_only)) {
            return "this machine gives no mount namespace: without one a command has no working folder, so "
                   "it can neither have files beside its executable, nor write any, nor be a checker";
        }
        return {};
    }

    /// Runs the command on one test. The report is of kind Finished, or CannotExecute.
    Report run(const Message<Request>& test) {
        prepare_folder(test.fds);
        auto& beginning = *worker_.beginning;
        beginning.isolated = false;
        beginning.execute_error = 0;
        const auto cpu_before = cpu_time_of_children();
        const pid_t self = ::getpid();
        const pid_t child = ::fork();
        must(child >= 0, "fork");
        if (child == 0) become_command(test.fds, self);

        Report report{};
        report.stopped = watch(worker_.socket, child, limits_, beginning);
        reap(child, report);
        if (!beginning.isolated) ::_exit(kSetupFailed);  // the child has said why
        report.kind = beginning.execute_error ? Report::Kind::CannotExecute : Report::Kind::Finished;
        report.wall_ns = read_clock(CLOCK_MONOTONIC) - beginning.time_ns;
        report.cpu_ns = cpu_time_of_children() - cpu_before - beginning.cpu_ns;
        if (folder_ && !command_.outputs.empty()) {
            const auto outputs = encode(folder_->read(command_.outputs));
            write_whole(test.fds.at(kOutputsAt).get(), outputs, "write the outputs");
        }
        return report;
    }

    const std::string& executable() const { return command_.arguments.front(); }

  private:
    /// One for all tests, unless they may change it or have files of their own.
    void prepare_folder(const std::vector<UniqueFd>& fds) {
        const bool is_check = fds.size() > kMostOfATest;
        if (!has_folder_ || (folder_ && limits_.file_bytes == 0 && !is_check)) return;
        folder_.reset();
        WorkFolderContent content{command_.files, limits_.file_bytes};
        std::array<std::string, kCheckerArguments.size()> texts;
        for (std::size_t i = 0; is_check && i < texts.size(); ++i) {
            texts[i] = read_whole(fds.at(kCheckedAt[i]).get());
            content.files.push_back({kCheckerArguments[i], texts[i]});
        }
        folder_.emplace(content, worker_.isolation.user);
    }

    /// Where no folder can be had: the command's only file, if it is the executable.
    UniqueFd executable_in_memory() const {
        const auto& file = command_.files.front();
        if (command_.files.size() > 1 || file.name != without_dot(executable())) return {};
        constexpr unsigned kExecutable = 0x10;  // MFD_EXEC, which older kernels do not know
        UniqueFd memory(::memfd_create("command", MFD_CLOEXEC | kExecutable));
        if (!memory) memory = UniqueFd(::memfd_create("command", MFD_CLOEXEC));
        must(static_cast<bool>(memory), "memfd_create");
        write_whole(memory.get(), file.content, "write an executable");
        return memory;
    }

    [[noreturn]] void become_command(const std::vector<UniqueFd>& fds, pid_t parent) {
        try {
            must(::setpgid(0, 0) == 0, "setpgid");
            for (std::size_t stream = 0; stream < kStreams; ++stream) {
                must(::dup2(fds.at(stream).get(), static_cast<int>(stream)) >= 0, "dup2");
            }
            constexpr unsigned kCloseOnExecute = 4;  // CLOSE_RANGE_CLOEXEC
            must(::syscall(SYS_close_range, kStreams, ~0U, kCloseOnExecute) == 0, "close_range");
            must(::chdir(folder_ ? kWorkFolder : "/") == 0, "chdir");
            drop_privileges(worker_.isolation);
            die_with(parent);  // after the change of user, which forgets it
            restrict_files_of_command(worker_.isolation, worker_.view, limits_.file_bytes > 0);
            const auto own_filter = compile(test_policy(::getpid(), kOwnArchitecture, command_.may_fork));
            limit_resources();  // last: what is ours may hold more than the command is allowed
            for (const auto* filter : {&filter_, &own_filter}) {
                const int error = install(*filter);
                if (error) throw std::system_error(error, std::generic_category(), "seccomp");
            }
        } catch (const std::system_error& error) {
            give_up(worker_, error);
        }
        begin(*worker_.beginning);
        execute();
        worker_.beginning->execute_error = errno;
        ::_exit(kSetupFailed);
    }

    void limit_resources() const {
        const auto& isolation = worker_.isolation;
        // Not the address space: run-time systems reserve far more than they use.
        limit(RLIMIT_DATA, static_cast<rlim_t>(limits_.memory_bytes + kStackRoom));
        limit_softly(RLIMIT_STACK, static_cast<rlim_t>(command_.stack_bytes));
        limit(RLIMIT_FSIZE, std::max(static_cast<rlim_t>(limits_.output_bytes), room_in_folder()));
        limit(RLIMIT_NOFILE, static_cast<rlim_t>(limits_.open_files));
        if (isolation.count_processes) {
            const int of_ours = isolation.processes_of_ours - (isolation.change_user ? 1 : 0);
            limit(RLIMIT_NPROC, static_cast<rlim_t>(limits_.processes + of_ours));
        }
        limit(RLIMIT_CPU, cpu_seconds(own_cpu_time() + limits_.cpu_ns));
    }

    /// No file can become as large. 0: none can be written.
    rlim_t room_in_folder() const { return folder_ && limits_.file_bytes > 0 ? folder_->size() : 0; }

    void execute() const {
        const auto arguments = pointers(command_.arguments);
        const auto environment = pointers(command_.environment);
        if (executable_) {
            ::syscall(SYS_execveat, executable_.get(), "", arguments.data(), environment.data(),
                      AT_EMPTY_PATH);
        } else {
            ::execve(executable().c_str(), arguments.data(), environment.data());
        }
    }

    /// Waits for the command, ends what it started, and waits for that.
    static void reap(pid_t child, Report& report) {
        rusage usage{};
        must(::wait4(child, &report.wait_status, 0, &usage) == child, "wait4");
        auto most_memory = usage.ru_maxrss;
        ::kill(-child, SIGKILL);  // the filter lets nothing leave the group
        while (::wait4(-1, nullptr, 0, &usage) > 0 || errno == EINTR) {
            most_memory = std::max(most_memory, usage.ru_maxrss);
        }
        report.peak_memory_bytes = static_cast<std::int64_t>(most_memory) * 1024;
    }

    const Worker& worker_;
    const Command command_;
    const Limits limits_;
    const bool has_folder_;
    const std::vector<sock_filter> filter_;
    UniqueFd executable_;
    std::optional<WorkFolder> folder_;
};

/// What a job process does: it has the right to mount, and runs no code that is not ours.
void run_tests(const Worker& worker, const Message<Request>& program) {
    // What a command leaves behind becomes this process's child.
    must(::prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0, "PR_SET_CHILD_SUBREAPER");
    const Mapping bytes(program.fds.at(0).get());
    CommandJob job(worker, decode_command(bytes.bytes()), program.header.limits);
    while (const auto request = receive_request(worker.socket)) {
        if (request->header.kind != Request::Kind::Test) return;
        const auto refusal = job.refusal(request->fds.size() > kMostOfATest);
        if (!refusal.empty()) return tell(worker, Report::Kind::CannotExecute, refusal);
        const auto report = job.run(*request);
        if (report.kind == Report::Kind::CannotExecute) {
            const auto why = std::system_category().message(worker.beginning->execute_error);
            return tell(worker, report.kind, "cannot execute " + job.executable() + ": " + why);
        }
        if (!send_message(worker.socket, report, {}, {})) return;
    }
}

[[noreturn]] void job_main(const Worker& worker, const Message<Request>& program, pid_t parent) {
    try {
        die_with(parent);
        run_tests(worker, program);
    } catch (const std::exception& error) {
        give_up(worker, error);
    }
    ::_exit(0);
}

void run_job(const Worker& worker, const Message<Request>& program) {
    const pid_t parent = worker.isolation.pid_namespace ? 0 : ::getpid();
    const pid_t job = ::fork();
    must(job >= 0, "fork");
    if (job == 0) job_main(worker, program, parent);
    int status = 0;
    must(::waitpid(job, &status, 0) == job, "waitpid");
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return;
    Report report{};
    report.kind = Report::Kind::Died;
    report.wait_status = status;
    report.compiled = true;
    send_message(worker.socket, report, {}, {});
}

}  // namespace

void serve_commands(int socket, pid_t supervisor, const FileView& view) {
    prepare_worker();
    const auto bare_memory = statm_field(1);
    Worker worker{socket, view, {}, shared<Beginning>()};
    try {
        worker.isolation = isolate_for_commands(view);
        die_with(supervisor);
    } catch (const std::system_error& error) {
        give_up(worker, error);
    }
    Report ready{};
    ready.kind = Report::Kind::Ready;
    ready.bare_memory_bytes = bare_memory;
    ready.layers = worker.isolation.errors;
    if (!send_message(socket, ready, {}, {})) return;
    while (const auto request = receive_request(socket)) {
        // Tests and ends that a dead job process left unread are passed over.
        if (request->header.kind == Request::Kind::Program) run_job(worker, *request);
    }
}

}  // namespace rlef
