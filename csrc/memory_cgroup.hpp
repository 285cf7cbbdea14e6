#pragma once

#include <sys/types.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "limits.hpp"

namespace rlef {

/// One worker's memory and that of all its children, counted and limited by the kernel. Knows both versions
/// of the interface. Every step throws std::system_error, whose text names the folder, the step and the mend.
class MemoryCgroup {
  public:
    /// What the kernel ended for want of memory.
    enum class Kill { Nothing, AtOwnLimit, ForAnother };

    /// Of a cgroup that exists already.
    explicit MemoryCgroup(std::string folder);

    /// Takes a process in, and with it the children that it has from then on.
    void enter(pid_t process) const;
    /// Takes present use for what the worker holds before it has seen a program.
    void note_rest();
    /// For a job to come: use is cut off at these limits on top of the use at rest. `files` are bytes that
    /// its working folder may hold.
    void limit(const Limits& limits, std::int64_t files);
    /// Takes one of the kills of the present job. Who asks because a process was killed gets that one: others
    /// may have followed.
    Kill take_kill();
    /// Takes all that there are. Who asks has seen the end of all processes that can have been killed.
    Kill take_all_kills();

    const std::string& folder() const { return folder_; }

  private:
    std::int64_t use() const;
    std::int64_t kills() const;
    std::int64_t times_at_limit() const;
    void make_room(std::int64_t bytes) const;
    void write_limit(std::int64_t bytes) const;
    bool has(const char* file) const;
    std::int64_t number_in(const char* file) const;
    std::string read(const char* file) const;
    void write(const char* file, const std::string& text) const;
    bool can_write(const char* file, const std::string& text) const;

    std::string folder_;
    bool first_version_;
    bool limits_swap_;  // there is a file for it
    std::int64_t at_rest_ = 0;
    std::int64_t limit_;
    std::int64_t taken_kills_ = 0;
    std::int64_t at_limit_before_job_ = 0;
};

/// Why the kernel ended a process with this wait status, if for want of memory. Nothing where there is no
/// cgroup.
MemoryCgroup::Kill take_kill(std::optional<MemoryCgroup>& cgroup, int wait_status);
/// The same for a test of several processes, each of which may have been killed. Nothing where it ended well.
MemoryCgroup::Kill take_all_kills(std::optional<MemoryCgroup>& cgroup, int wait_status);
/// Whether a worker that is gone was ended at its limit. False where its cgroup is gone too: nobody knows.
bool is_ended_at_limit(std::optional<MemoryCgroup>& cgroup);

/// Makes cgroups for workers below a folder that the caller was given, and removes them.
class MemoryCgroups {
  public:
    /// Removes what callers left behind that were ended before they could.
    explicit MemoryCgroups(std::string folder);

    /// Throws std::system_error.
    MemoryCgroup make();
    /// Removes a worker's cgroup, or notes it for later when processes are still ending in it.
    void remove(const MemoryCgroup& cgroup);
    void remove_ended();
    /// Removes what is left, and waits for processes that are ending; not for ever.
    void remove_all();

  private:
    std::string folder_;
    std::vector<std::string> ended_;
};

}  // namespace rlef
