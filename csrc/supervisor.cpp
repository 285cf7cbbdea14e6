#include "supervisor.hpp"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/wait.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "memory_file.hpp"
#include "must.hpp"
#include "verdict.hpp"

namespace rlef {
namespace {

using namespace std::chrono_literals;

constexpr int kWorkerSocket = 3;
constexpr unsigned kMostAttempts = 3;
constexpr unsigned kMostFailedStarts = 3;  // in a row
constexpr auto kPauseAfterFailedStart = 100ms;
constexpr auto kPauseAfterMostFailedStarts = 1s;
constexpr std::size_t kTestsAhead = 2;  // one runs while the next already waits in the socket
constexpr std::size_t kFewTests = 2;    // compile the program in each: cheaper than one more process
constexpr std::int64_t kMostFileBytes = std::int64_t{1} << 58;  // that can be added up
constexpr auto kStartPatience = 60s;
constexpr auto kNoMemoryForUs = "the kernel ended it for memory that its own cgroup had left";

/// posix_spawn's two records.
class SpawnSettings {
  public:
    SpawnSettings() {
        ::posix_spawn_file_actions_init(&actions);
        ::posix_spawnattr_init(&attributes);
        sigset_t none, all;
        ::sigemptyset(&none);
        ::sigfillset(&all);
        ::posix_spawnattr_setsigmask(&attributes, &none);
        ::posix_spawnattr_setsigdefault(&attributes, &all);
        // A session of its own: no terminal, and the user's Ctrl-C is for us alone.
        ::posix_spawnattr_setflags(&attributes,
                                   POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSID);
    }
    ~SpawnSettings() {
        ::posix_spawn_file_actions_destroy(&actions);
        ::posix_spawnattr_destroy(&attributes);
    }
    SpawnSettings(const SpawnSettings&) = delete;
    SpawnSettings& operator=(const SpawnSettings&) = delete;

    posix_spawn_file_actions_t actions;
    posix_spawnattr_t attributes;
};

/// What a command's working folder may hold.
std::int64_t memory_of_files(const Job& job) {
    if (job.kind == ProgramKind::Python) return 0;
    return static_cast<std::int64_t>(job.program.size()) + std::min(job.limits.file_bytes, kMostFileBytes);
}

ProgramKind other(ProgramKind kind) {
    return kind == ProgramKind::Python ? ProgramKind::Command : ProgramKind::Python;
}

void block_all_signals() {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

}  // namespace

/// One worker process and what it is doing.
struct WorkerSlot {
    enum class State { Absent, Starting, Idle, Busy };
    ProgramKind kind = ProgramKind::Python;
    State state = State::Absent;
    pid_t pid = -1;
    UniqueFd socket;
    bool is_readable = false;  // the socket, when we last looked
    UniqueFd log;              // the worker's standard error
    std::int64_t bare_memory_bytes = 0;
    std::optional<MemoryCgroup> cgroup;
    unsigned failed_starts = 0;
    std::chrono::steady_clock::time_point start_at;  // Absent: not before
    std::chrono::steady_clock::time_point deadline;

    std::shared_ptr<Batch> batch;
    std::size_t job_index = 0;
    std::shared_ptr<Check> check;
    unsigned attempts = 0;
    std::chrono::steady_clock::time_point begun;
    std::size_t next_to_send = 0;
    std::size_t next_to_report = 0;
    std::deque<Streams> streams;  // of the tests sent and not reported

    bool is_awaited() const { return state == State::Starting || state == State::Busy; }
    /// What it runs: a job, or the checker of that job.
    const Job& job() const { return check ? check->job : batch->jobs[job_index]; }
    std::vector<Outcome>& outcomes() const { return check ? check->outcomes : batch->outcomes[job_index]; }
};

Supervisor::Supervisor(WorkerCommand for_python, WorkerCommand for_commands, unsigned workers,
                       std::uint32_t allowed_missing, const std::string& memory_cgroup,
                       std::chrono::nanoseconds report_patience)
    : for_python_(std::move(for_python)),
      for_commands_(std::move(for_commands)),
      workers_(workers),
      allowed_missing_(allowed_missing),
      report_patience_(report_patience),
      owner_(::getpid()),
      wake_up_(::eventfd(0, EFD_CLOEXEC)) {
    must(static_cast<bool>(wake_up_), "eventfd");
    if (!memory_cgroup.empty()) memory_cgroups_.emplace(memory_cgroup);
    for (const auto kind : {ProgramKind::Python, ProgramKind::Command}) {
        for (unsigned i = 0; i < workers; ++i) {
            slots_.push_back(std::make_unique<WorkerSlot>());
            slots_.back()->kind = kind;
        }
    }
    thread_ = std::thread([this] { supervise(); });
}

Supervisor::~Supervisor() {
    close();
}

bool Supervisor::wait_until_ready(std::chrono::milliseconds patience) {
    Lock lock(mutex_);
    return changed_.wait_for(lock, patience, [this] { return !fault_.empty() || all_ready(); });
}

bool Supervisor::all_ready() const {
    return std::all_of(slots_.begin(), slots_.end(), [](const auto& slot) {
        return slot->kind == ProgramKind::Command || slot->state == WorkerSlot::State::Idle ||
               slot->state == WorkerSlot::State::Busy;
    });
}

std::string Supervisor::fault() {
    const Lock lock(mutex_);
    return fault_;
}

LayerErrors Supervisor::layers() {
    const Lock lock(mutex_);
    return layers_;
}

std::vector<pid_t> Supervisor::worker_pids() {
    const Lock lock(mutex_);
    std::vector<pid_t> pids;
    for (const auto& slot : slots_) {
        if (slot->pid > 0) pids.push_back(slot->pid);
    }
    return pids;
}

std::uint64_t Supervisor::restarts() {
    const Lock lock(mutex_);
    return restarts_;
}

Tally Supervisor::take_tally() {
    const Lock lock(mutex_);
    return std::exchange(tally_, {});
}

void Supervisor::submit(const std::shared_ptr<Batch>& batch) {
    const Lock lock(mutex_);
    if (!fault_.empty()) batch->fault = fault_;
    if (closing_) batch->fault = "the executor is closed";
    if (!batch->fault.empty()) return;
    for (std::size_t i = 0; i < batch->jobs.size(); ++i) {
        const auto& job = batch->jobs[i];
        const bool has_checker = !job.checker.empty();
        if (job.kind == ProgramKind::Command || (has_checker && job.checker_kind == ProgramKind::Command)) {
            has_commands_ = true;
        }
        if (job.tests.empty()) {
            --batch->remaining;
            batch->finished.push_back(i);
        } else {
            queue_.push_back({batch, i, 0, 0});
        }
    }
    wake();
}

bool Supervisor::wait(Batch& batch, Until until, std::chrono::milliseconds patience) {
    Lock lock(mutex_);
    const bool any = until == Until::AnyFinished;
    batch.each_awaited = any;
    return changed_.wait_for(lock, patience,
                             [&] { return batch.is_over() || (any && !batch.finished.empty()); });
}

std::vector<FinishedJob> Supervisor::take_finished(Batch& batch) {
    const Lock lock(mutex_);
    std::vector<FinishedJob> taken;
    for (const auto index : batch.finished) taken.push_back({index, std::move(batch.outcomes[index])});
    batch.finished.clear();
    if (batch.notifier && !batch.is_over()) {
        std::uint64_t count;
        // NOLINTNEXTLINE(clang-analyzer-unix.BlockInCriticalSection): the descriptor does not block
        [[maybe_unused]] const auto size = ::read(batch.notifier.get(), &count, sizeof count);
    }
    return taken;
}

bool Supervisor::is_over(const Batch& batch) {
    const Lock lock(mutex_);
    return batch.is_over();
}

std::string Supervisor::batch_fault(const Batch& batch) {
    const Lock lock(mutex_);
    return batch.fault;
}

int Supervisor::notifier(Batch& batch) {
    const Lock lock(mutex_);
    if (!batch.notifier) {
        batch.notifier = UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        must(static_cast<bool>(batch.notifier), "eventfd");
        if (batch.is_over() || !batch.finished.empty()) tell(batch);
    }
    return batch.notifier.get();
}

void Supervisor::cancel(const std::shared_ptr<Batch>& batch) {
    if (::getpid() != owner_) return;  // a fork's copy: the lock may be held for ever
    const Lock lock(mutex_);
    if (batch->is_over()) return;
    batch->cancelled = true;
    tell(*batch);
    changed_.notify_all();
    wake();
}

void Supervisor::close() {
    if (::getpid() != owner_) {  // a fork has the object, but not its thread nor its workers
        if (thread_.joinable()) thread_.detach();
        return;
    }
    {
        const Lock lock(mutex_);
        closing_ = true;
        wake();
    }
    if (thread_.joinable()) thread_.join();
}

void Supervisor::wake() {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written =
        ::write(wake_up_.get(), &one, sizeof one);  // full means: awake already
}

void Supervisor::supervise() {
    block_all_signals();
    Lock lock(mutex_);
    try {
        while (!closing_) {
            start_absent_workers();
            assign_jobs();
            note_who_is_alone();
            lock.unlock();
            wait_for_events();
            lock.lock();
            for (auto& slot : slots_) {
                if (slot->batch && slot->batch->cancelled) stop(*slot);
                if (slot->is_readable) {
                    read_report(*slot);
                } else if (slot->is_awaited() && Clock::now() > slot->deadline) {
                    handle_death(*slot, "it did not answer in time");
                }
            }
        }
        fail_everything("the executor was closed");
    } catch (const std::exception& error) {
        fail_everything(std::string("the executor's supervisor failed: ") + error.what());
    }
    for (auto& slot : slots_) stop(*slot);
    if (memory_cgroups_) memory_cgroups_->remove_all();
}

void Supervisor::wait_for_events() {
    // Slots and the fault change in this thread only: looking needs no lock.
    std::vector<pollfd> events;
    auto until = Clock::now() + 1h;
    for (const auto& slot : slots_) {
        const bool to_be_started = slot->state == WorkerSlot::State::Absent && is_wanted(*slot);
        if (to_be_started) until = std::min(until, slot->start_at);
        if (slot->is_awaited()) until = std::min(until, slot->deadline);
        events.push_back({slot->socket.get(), POLLIN, 0});  // poll passes over what is none
    }
    events.push_back({wake_up_.get(), POLLIN, 0});
    const auto patience = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
    ::poll(events.data(), events.size(), static_cast<int>(std::max<std::int64_t>(patience, 0)));
    for (std::size_t i = 0; i < slots_.size(); ++i) slots_[i]->is_readable = events[i].revents != 0;
    if (events.back().revents) {
        std::uint64_t count;
        [[maybe_unused]] const auto size = ::read(wake_up_.get(), &count, sizeof count);
    }
}

/// Whether an absent worker should be started. Most executors never run a command.
bool Supervisor::is_wanted(const WorkerSlot& slot) const {
    return fault_.empty() && (slot.kind == ProgramKind::Python || has_commands_);
}

void Supervisor::start_absent_workers() {
    for (auto& slot : slots_) {
        const bool due = slot->state == WorkerSlot::State::Absent && Clock::now() >= slot->start_at;
        if (!due || !is_wanted(*slot)) continue;
        try {
            start(*slot);
        } catch (const std::system_error& error) {
            stop(*slot);
            handle_failed_start(*slot, error.what());
        }
    }
}

void Supervisor::start(WorkerSlot& slot) {
    int ends[2];
    must(::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) == 0, "socketpair");
    slot.socket = UniqueFd(ends[0]);
    const UniqueFd theirs(ends[1]);
    slot.log = memory_file("worker log");
    if (memory_cgroups_) slot.cgroup = memory_cgroups_->make();
    SpawnSettings settings;
    for (const int stream : {0, 1}) {
        ::posix_spawn_file_actions_addopen(&settings.actions, stream, "/dev/null", O_RDWR, 0);
    }
    ::posix_spawn_file_actions_adddup2(&settings.actions, slot.log.get(), 2);
    ::posix_spawn_file_actions_adddup2(&settings.actions, theirs.get(), kWorkerSocket);
    const auto& [arguments, environment] = slot.kind == ProgramKind::Python ? for_python_ : for_commands_;
    const auto& executable = arguments.front();
    const int error = ::posix_spawn(&slot.pid, executable.c_str(), &settings.actions, &settings.attributes,
                                    pointers(arguments).data(), pointers(environment).data());
    if (error) throw std::system_error(error, std::generic_category(), "start " + executable);
    if (slot.cgroup) slot.cgroup->enter(slot.pid);
    slot.state = WorkerSlot::State::Starting;
    slot.deadline = Clock::now() + kStartPatience;
}

void Supervisor::stop(WorkerSlot& slot) {
    if (slot.pid > 0) {  // its children die with it
        ::kill(slot.pid, SIGKILL);
        while (::waitpid(slot.pid, nullptr, 0) < 0 && errno == EINTR) {
        }
    }
    if (slot.cgroup && memory_cgroups_) memory_cgroups_->remove(*slot.cgroup);
    WorkerSlot absent;
    absent.kind = slot.kind;
    absent.failed_starts = slot.failed_starts;
    absent.start_at = slot.start_at;
    slot = std::move(absent);
}

/// Empty when none is idle, or as many workers are busy as may be.
WorkerSlot* Supervisor::idle_slot(ProgramKind kind) {
    WorkerSlot* idle = nullptr;
    unsigned busy = 0;
    for (auto& slot : slots_) {
        if (slot->state == WorkerSlot::State::Busy) ++busy;
        if (slot->state == WorkerSlot::State::Idle && slot->kind == kind) idle = slot.get();
    }
    return busy < workers_ ? idle : nullptr;
}

void Supervisor::assign_jobs() {
    std::size_t passed_over = 0;  // jobs for which no worker is idle
    while (passed_over < queue_.size()) {
        const auto place = queue_.begin() + static_cast<std::ptrdiff_t>(passed_over);
        const bool is_live = !place->batch->cancelled && place->batch->fault.empty();
        auto* const slot = is_live ? idle_slot(place->kind()) : nullptr;
        if (is_live && !slot) {
            if (++passed_over == 1 && !idle_slot(other(place->kind()))) return;
            continue;
        }
        auto job = std::move(*place);
        queue_.erase(place);
        if (slot) give(*slot, std::move(job));
    }
}

void Supervisor::give(WorkerSlot& slot, QueuedJob job) {
    slot.batch = std::move(job.batch);
    slot.check = std::move(job.check);
    slot.job_index = job.index;
    slot.attempts = job.attempts + 1;
    slot.begun = job.begun == Clock::time_point{} ? Clock::now() : job.begun;
    slot.next_to_send = slot.next_to_report = job.first_test;
    slot.state = WorkerSlot::State::Busy;
    try {
        if (slot.cgroup) slot.cgroup->limit(slot.job().limits, memory_of_files(slot.job()));
        const auto source = sealed_file("program", slot.job().program);
        const bool few_tests = slot.job().tests.size() - job.first_test <= kFewTests;
        const Request request{Request::Kind::Program, few_tests, slot.job().limits};
        if (send_message(slot.socket.get(), request, slot.job().function, {source.get()})) send_tests(slot);
        // A worker that is gone shows itself when its reports are read.
    } catch (const std::system_error& error) {
        handle_death(slot, error.what());
    }
}

void Supervisor::send_tests(WorkerSlot& slot) {
    const auto& job = slot.job();
    // What a command's processes did at the memory limit is known when the next test has not begun.
    const bool one_by_one = job.stop_at_first_failure || (slot.cgroup && job.kind == ProgramKind::Command);
    const std::size_t ahead = one_by_one ? 1 : kTestsAhead;
    while (slot.next_to_send < job.tests.size() && slot.streams.size() < ahead) {
        const auto input = sealed_file("input", job.tests[slot.next_to_send].input);
        Streams streams{memory_file("output"), memory_file("error"), {}};
        const Request request{Request::Kind::Test, 0, job.limits};
        std::vector<int> fds{input.get(), streams.out.get(), streams.err.get()};
        if (job.kind == ProgramKind::Command) {
            streams.files = memory_file("files");
            fds.push_back(streams.files.get());
        }
        UniqueFd expected, output;
        if (slot.check) {
            expected = sealed_file("expected output", job.tests[slot.next_to_send].expected_output);
            output = sealed_file("output", slot.check->outputs[slot.next_to_send]);
            fds.insert(fds.end(), {expected.get(), output.get()});
        }
        if (!send_message(slot.socket.get(), request, {}, fds)) return;
        slot.streams.push_back(std::move(streams));
        ++slot.next_to_send;
    }
    slot.deadline = Clock::now() + std::chrono::nanoseconds(job.limits.wall_ns) + report_patience_;
}

/// One at a time: to find out that there is no other would take a system call more.
void Supervisor::read_report(WorkerSlot& slot) {
    try {
        const auto report = receive_report(slot.socket.get(), MSG_DONTWAIT);
        if (report) return handle(slot, *report);
        const auto log = last_line(read_range(slot.log, 0, size_of(slot.log)));
        handle_death(slot, log.empty() ? "it ended" : log);
    } catch (const std::system_error& error) {
        handle_death(slot, error.what());
    }
}

void Supervisor::handle(WorkerSlot& slot, const Message<Report>& report) {
    switch (report.header.kind) {
        case Report::Kind::Ready:
            return handle_ready(slot, report.header);
        case Report::Kind::Finished:
            return handle_finished(slot, report.header);
        case Report::Kind::NotCompiled:
            return handle_end_of_program(slot, not_compiled(report, slot.job().limits));
        case Report::Kind::Died: {
            const int status = report.header.wait_status;
            if (report.header.compiled || !WIFSIGNALED(status)) {
                return handle_death(slot, "a solution process ended with status " + std::to_string(status));
            }
            Outcome outcome;  // the compiler itself crashed on this source
            note_status(outcome, status);
            const bool slow = WTERMSIG(status) == SIGXCPU;
            outcome.verdict = slow ? Verdict::Timeout : Verdict::Exception;
            if (slow) outcome.stopped_by = StoppedBy::CpuLimit;
            const auto killed = take_kill(slot.cgroup, status);
            if (killed == MemoryCgroup::Kill::ForAnother) return handle_death(slot, kNoMemoryForUs);
            if (killed == MemoryCgroup::Kill::AtOwnLimit) note_end_at_memory_limit(outcome);
            return handle_end_of_program(slot, outcome);
        }
        case Report::Kind::CannotIsolate:
            if (slot.state == WorkerSlot::State::Starting && slot.kind == ProgramKind::Python &&
                !ever_ready_) {
                return fail_everything("a worker could not isolate itself: " + report.text);
            }
            return handle_death(slot, report.text);
        case Report::Kind::CannotExecute:
            fail_batch(*slot.batch, report.text);
            return make_idle(slot);
    }
}

void Supervisor::handle_ready(WorkerSlot& slot, const Report& report) {
    layers_ = report.layers;
    slot.bare_memory_bytes = report.bare_memory_bytes;
    std::string missing;
    for (std::size_t layer = 0; layer < kLayers; ++layer) {
        if (report.layers[layer] == 0 || (allowed_missing_ >> layer) & 1) continue;
        missing += (missing.empty() ? "" : ", ");
        missing += "'" + std::string(kLayerNames[layer]) + "'";
    }
    if (!missing.empty()) {
        return fail_everything("this machine does not give the isolation layers {" + missing +
                               "}: mend that, or accept it with allow_missing={" + missing + "}");
    }
    if (slot.cgroup) slot.cgroup->note_rest();
    if (memory_cgroups_) memory_cgroups_->remove_ended();  // that of the worker that this one replaces
    slot.failed_starts = 0;
    slot.state = WorkerSlot::State::Idle;
    ever_ready_ = ever_ready_ || all_ready();
    changed_.notify_all();
}

void Supervisor::handle_finished(WorkerSlot& slot, const Report& report) {
    if (slot.streams.empty()) return;
    const auto& job = slot.job();
    const auto killed = job.kind == ProgramKind::Command ? take_all_kills(slot.cgroup, report.wait_status)
                                                         : take_kill(slot.cgroup, report.wait_status);
    if (killed == MemoryCgroup::Kill::ForAnother) return handle_death(slot, kNoMemoryForUs);
    const auto& test = job.tests[slot.next_to_report];
    auto outcome = judge(report, slot.streams.front(), job, test, slot.bare_memory_bytes);
    if (killed == MemoryCgroup::Kill::AtOwnLimit) note_end_at_memory_limit(outcome);
    const bool failed = outcome.verdict != Verdict::Passed;
    slot.streams.pop_front();
    slot.outcomes()[slot.next_to_report++] = std::move(outcome);
    if (slot.next_to_report == job.tests.size() || (failed && job.stop_at_first_failure)) {
        const Request end{Request::Kind::End, 0, job.limits};
        send_message(slot.socket.get(), end, {}, {});
        return finish_job(slot);
    }
    send_tests(slot);
}

/// A program that was never run: every test says the same, or the first one where the rest is skipped.
void Supervisor::handle_end_of_program(WorkerSlot& slot, const Outcome& outcome) {
    auto& outcomes = slot.outcomes();
    const auto last = slot.job().stop_at_first_failure ? slot.next_to_report + 1 : outcomes.size();
    std::fill(outcomes.begin() + static_cast<std::ptrdiff_t>(slot.next_to_report),
              outcomes.begin() + static_cast<std::ptrdiff_t>(last), outcome);
    finish_job(slot);
}

void Supervisor::finish_job(WorkerSlot& slot) {
    if (slot.check) {
        finish_check(slot);
    } else if (auto check = check_of(slot.job(), slot.outcomes())) {
        queue_.push_front({slot.batch, slot.job_index, 0, 0, std::move(check), slot.begun});
        return make_idle(slot);
    }
    ++tally_.programs;
    tally_.longest = std::max<std::chrono::nanoseconds>(tally_.longest, Clock::now() - slot.begun);
    auto& batch = *slot.batch;
    --batch.remaining;
    batch.finished.push_back(slot.job_index);
    if (batch.remaining == 0 || batch.each_awaited) changed_.notify_all();
    tell(batch);
    make_idle(slot);
}

/// The checker's word becomes the job's verdicts.
void Supervisor::finish_check(WorkerSlot& slot) {
    const auto check = std::move(slot.check);
    auto& outcomes = slot.outcomes();
    for (std::size_t i = 0; i < check->tests.size(); ++i) {
        auto& outcome = outcomes[check->tests[i]];
        const auto& answer = check->outcomes[i];
        const auto kind = check->job.kind;
        const auto accepted = word_of(kind, answer);
        if (!accepted) {
            fail_batch(*slot.batch, "the checker failed on test " + std::to_string(check->tests[i]) + ": " +
                                        misconduct(kind, answer));
        }
        if (!accepted.value_or(false)) outcome.verdict = Verdict::WrongOutput;
        cut_output(outcome, slot.job().limits);
    }
    if (slot.job().stop_at_first_failure) skip_after_failure(outcomes);
}

void Supervisor::make_idle(WorkerSlot& slot) {
    slot.batch.reset();
    slot.check.reset();
    slot.streams.clear();
    slot.state = WorkerSlot::State::Idle;
    assign_jobs();
}

void Supervisor::handle_death(WorkerSlot& slot, const std::string& why) {
    const bool starting = slot.state == WorkerSlot::State::Starting;
    const auto fault = "an executor worker failed: " + why;
    if (slot.batch && is_ended_at_limit(slot.cgroup)) {
        handle_death_at_memory_limit(slot);
    } else if (slot.batch) {
        if (slot.attempts >= kMostAttempts) {
            fail_batch(*slot.batch, fault + " (" + std::to_string(slot.attempts) + " attempts)");
        } else {
            queue_.push_front(
                {slot.batch, slot.job_index, slot.attempts, slot.next_to_report, slot.check, slot.begun});
            ++tally_.retries;
        }
    }
    stop(slot);
    ++restarts_;
    ++tally_.restarts;
    if (starting) handle_failed_start(slot, fault);
}

/// The kernel chose a process of ours, because the program held memory where no process is charged with it
/// (in pipes, say). That is the program's doing; its further tests, if any, get another worker.
void Supervisor::handle_death_at_memory_limit(WorkerSlot& slot) {
    auto& outcome = slot.outcomes()[slot.next_to_report++];
    outcome.signal = SIGKILL;
    note_end_at_memory_limit(outcome);
    const auto& job = slot.job();
    if (slot.next_to_report < job.tests.size() && !job.stop_at_first_failure) {
        queue_.push_front({slot.batch, slot.job_index, 0, slot.next_to_report, slot.check, slot.begun});
        return;
    }
    WorkerSlot over;
    over.batch = std::move(slot.batch);
    over.check = std::move(slot.check);
    over.job_index = slot.job_index;
    over.begun = slot.begun;
    finish_job(over);
}

/// Tries again a little later. After several failures what waits is given up, where no other worker is left
/// to do it; but once there were workers, there may be some again.
void Supervisor::handle_failed_start(WorkerSlot& slot, const std::string& fault) {
    const auto now = Clock::now();
    slot.start_at = now + kPauseAfterFailedStart;
    if (++slot.failed_starts < kMostFailedStarts) return;
    if (!ever_ready_ && slot.kind == ProgramKind::Python) return fail_everything(fault);
    slot.failed_starts = 0;
    slot.start_at = now + kPauseAfterMostFailedStarts;
    const bool any_left = std::any_of(slots_.begin(), slots_.end(), [&slot](const auto& other) {
        const bool works = other->state == WorkerSlot::State::Idle || other->state == WorkerSlot::State::Busy;
        return works && other->kind == slot.kind;
    });
    if (!any_left) fail_queue(slot.kind, fault);
}

void Supervisor::note_who_is_alone() {
    const auto busy = std::count_if(slots_.begin(), slots_.end(),
                                    [](const auto& slot) { return slot->state == WorkerSlot::State::Busy; });
    const auto before = std::exchange(under_way_, queue_.size() + static_cast<std::size_t>(busy));
    const auto now = Clock::now();
    if (under_way_ == 0 && alone_since_) {
        tally_.alone = std::max<std::chrono::nanoseconds>(tally_.alone, now - *alone_since_);
    }
    if (under_way_ != 1) alone_since_.reset();
    if (under_way_ == 1 && before > 1) alone_since_ = now;
}

void Supervisor::fail_batch(Batch& batch, const std::string& fault) {
    if (batch.fault.empty()) batch.fault = fault;
    tell(batch);
    changed_.notify_all();
}

void Supervisor::tell(Batch& batch) {
    const std::uint64_t one = 1;
    if (batch.notifier) {
        [[maybe_unused]] const auto written = ::write(batch.notifier.get(), &one, sizeof one);
    }
}

/// Jobs that wait for a worker of this kind.
void Supervisor::fail_queue(ProgramKind kind, const std::string& fault) {
    const auto kept = std::stable_partition(queue_.begin(), queue_.end(),
                                            [kind](const auto& job) { return job.kind() != kind; });
    for (auto job = kept; job != queue_.end(); ++job) fail_batch(*job->batch, fault);
    queue_.erase(kept, queue_.end());
}

void Supervisor::fail_everything(const std::string& fault) {
    if (fault_.empty()) fault_ = fault;
    for (const auto kind : {ProgramKind::Python, ProgramKind::Command}) fail_queue(kind, fault);
    for (auto& slot : slots_) {
        if (slot->batch) fail_batch(*slot->batch, fault);
        stop(*slot);
    }
    changed_.notify_all();
}

}  // namespace rlef
