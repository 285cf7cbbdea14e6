#pragma once

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "isolation.hpp"
#include "job.hpp"
#include "memory_cgroup.hpp"
#include "message.hpp"
#include "unique_fd.hpp"

namespace rlef {

/// Jobs that were submitted together. Guarded by the supervisor's mutex once submitted.
struct Batch {
    explicit Batch(std::vector<Job> work) : jobs(std::move(work)), remaining(jobs.size()) {
        for (const auto& job : jobs) outcomes.emplace_back(job.tests.size());
    }
    bool is_over() const { return remaining == 0 || cancelled || !fault.empty(); }

    const std::vector<Job> jobs;
    std::vector<std::vector<Outcome>> outcomes;
    std::size_t remaining;              // jobs
    std::vector<std::size_t> finished;  // jobs whose outcomes nobody has taken yet, in order
    std::string fault;                  // not empty: the machine failed
    bool cancelled = false;
    bool each_awaited = false;  // somebody waits for single jobs, not only for the end
    UniqueFd notifier;          // eventfd, made when it is asked for: readable when there is news
};

/// A job of a batch and what came of its tests.
struct FinishedJob {
    std::size_t index;
    std::vector<Outcome> outcomes;
};

/// How a worker is started.
struct WorkerCommand {
    std::vector<std::string> arguments;  // the first is the interpreter's path
    std::vector<std::string> environment;
};

/// What there was to do since somebody asked.
struct Tally {
    std::uint64_t programs = 0;  // that ended, with all their tests
    std::uint64_t restarts = 0;  // of workers
    std::uint64_t retries = 0;   // programs given to another worker, since the machine failed the first
    std::chrono::nanoseconds longest{0};  // of a program, from its first worker to its end
    std::chrono::nanoseconds alone{0};    // the longest that one program went on when all others had ended
};

struct WorkerSlot;

/// Keeps the workers, hands them programs and tests, and judges what comes back. One thread of its own; any
/// thread may call. It never touches the interpreter of the process that it lives in.
class Supervisor {
  public:
    /// Starts the workers for Python; `wait_until_ready` says when they are. Those for commands are started
    /// when there is a command to run. No more than `workers` of either kind are busy at once. Each gets a
    /// cgroup below `memory_cgroup`, if that is not empty. One that has not reported `report_patience` after
    /// a test's wall limit is replaced. Throws std::system_error.
    Supervisor(WorkerCommand for_python, WorkerCommand for_commands, unsigned workers,
               std::uint32_t allowed_missing, const std::string& memory_cgroup,
               std::chrono::nanoseconds report_patience);
    ~Supervisor();
    Supervisor(const Supervisor&) = delete;
    Supervisor& operator=(const Supervisor&) = delete;

    /// True when every worker is ready or the supervisor has failed; false after `patience`.
    bool wait_until_ready(std::chrono::milliseconds patience);
    /// Not empty: no work will be done any more, and why.
    std::string fault();
    LayerErrors layers();
    std::vector<pid_t> worker_pids();
    std::uint64_t restarts();
    Tally take_tally();

    void submit(const std::shared_ptr<Batch>& batch);
    /// What to wait for: the end of the batch, or any job that can be taken (or the end).
    enum class Until { Over, AnyFinished };
    /// True when it has come; false after `patience`. The batch is over when all its jobs are finished, when
    /// it is cancelled, or when it has a fault.
    bool wait(Batch& batch, Until until, std::chrono::milliseconds patience);
    /// The finished jobs that nobody has taken yet. Throws nothing; a fault is left to `batch_fault`.
    std::vector<FinishedJob> take_finished(Batch& batch);
    bool is_over(const Batch& batch);
    std::string batch_fault(const Batch& batch);
    /// A descriptor that becomes readable when a job finishes or the batch is over. It belongs to the batch.
    int notifier(Batch& batch);
    /// Ends the batch's programs, those that wait and those that run. What is finished can still be taken.
    void cancel(const std::shared_ptr<Batch>& batch);
    /// Ends all workers. Batches under way get a fault.
    void close();

  private:
    using Clock = std::chrono::steady_clock;
    using Lock = std::unique_lock<std::mutex>;

    struct QueuedJob {
        std::shared_ptr<Batch> batch;
        std::size_t index;
        unsigned attempts;
        std::size_t first_test;                  // those before have their outcome
        std::shared_ptr<Check> check = nullptr;  // not null: the job's tests are run, and are to be checked
        Clock::time_point begun{};               // when a worker was first given it

        ProgramKind kind() const { return check ? check->job.kind : batch->jobs[index].kind; }
    };

    bool all_ready() const;
    void supervise();
    void start_absent_workers();
    void start(WorkerSlot& slot);
    void handle_failed_start(WorkerSlot& slot, const std::string& fault);
    void stop(WorkerSlot& slot);
    bool is_wanted(const WorkerSlot& slot) const;
    WorkerSlot* idle_slot(ProgramKind kind);
    void assign_jobs();
    void give(WorkerSlot& slot, QueuedJob job);
    void send_tests(WorkerSlot& slot);
    void read_report(WorkerSlot& slot);
    void handle(WorkerSlot& slot, const Message<Report>& report);
    void handle_ready(WorkerSlot& slot, const Report& report);
    void handle_finished(WorkerSlot& slot, const Report& report);
    void handle_end_of_program(WorkerSlot& slot, const Outcome& outcome);
    void handle_death(WorkerSlot& slot, const std::string& why);
    void handle_death_at_memory_limit(WorkerSlot& slot);
    void finish_job(WorkerSlot& slot);
    void finish_check(WorkerSlot& slot);
    void make_idle(WorkerSlot& slot);
    void fail_batch(Batch& batch, const std::string& fault);
    static void tell(Batch& batch);
    void fail_queue(ProgramKind kind, const std::string& fault);
    void fail_everything(const std::string& fault);
    void note_who_is_alone();
    void wait_for_events();
    void wake();

    const WorkerCommand for_python_;
    const WorkerCommand for_commands_;
    const unsigned workers_;
    const std::uint32_t allowed_missing_;
    const std::chrono::nanoseconds report_patience_;
    const pid_t owner_;
    UniqueFd wake_up_;  // eventfd

    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<QueuedJob> queue_;
    std::optional<MemoryCgroups> memory_cgroups_;
    std::vector<std::unique_ptr<WorkerSlot>> slots_;  // those for Python first
    LayerErrors layers_{};
    std::atomic<bool> has_commands_{false};  // there was one to run
    std::string fault_;
    std::uint64_t restarts_ = 0;
    Tally tally_;
    std::size_t under_way_ = 0;                     // programs that wait or run, when last noted
    std::optional<Clock::time_point> alone_since_;  // one goes on, and all others have ended
    bool ever_ready_ = false;  // all workers for Python at once: what fails before is for the caller to mend
    bool closing_ = false;
    std::thread thread_;
};

}  // namespace rlef
