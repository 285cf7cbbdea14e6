#include "memory_cgroup.hpp"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>

#include "unique_fd.hpp"

namespace rlef {
namespace {

using namespace std::chrono_literals;

constexpr std::int64_t kUnlimited = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kMostToAddUp = std::int64_t{1} << 58;
// What a test is charged with besides the memory that its limit is about: its copies of the interpreter's
// pages and those of the solution process, kernel stacks, and pages that the kernel counts ahead for each
// core.
constexpr std::int64_t kSlack = 16 << 20;
constexpr std::int64_t kBytesPerByteOfPageTables = 256;  // twice what dense use needs
constexpr std::int64_t kStreams = 4;  // of the test that runs, and of the one that is judged meanwhile
// Of the first version: little, but more than is charged at a time. A charge is tried on memory and swap
// first, and only failures of memory alone are counted.
constexpr std::int64_t kSwap = 2 << 20;
constexpr auto kStep = 1ms;
constexpr auto kPatienceForRoom = 300ms;  // a solution process that held gigabytes takes its time to end
constexpr int kStepsUntilEmpty = 3000;
constexpr auto kPrefix = "rlef-";

[[noreturn]] void fail(const std::string& folder, const std::string& step, int error) {
    throw std::system_error(error, std::generic_category(),
                            "memory_cgroup: " + folder + ": cannot " + step +
                                " (give a memory cgroup that this process may write, as `python -m "
                                "rlef_sandbox check` finds one, or none)");
}

bool exists(const std::string& path) {
    return ::access(path.c_str(), F_OK) == 0;
}

/// The number after a word at the beginning of a line; -1 where no line has it.
std::int64_t number_after(std::string_view word, const std::string& text) {
    const auto line = "\n" + std::string(word) + " ";
    const auto place = ("\n" + text).find(line);
    return place == std::string::npos ? -1 : ::strtoll(text.c_str() + place + line.size() - 1, nullptr, 10);
}

std::int64_t room(const Limits& limits) {
    const auto memory = std::min(limits.memory_bytes, kMostToAddUp);
    const auto output = std::min(limits.output_bytes, kMostToAddUp);
    return memory + memory / kBytesPerByteOfPageTables + kStreams * output + kSlack;
}

void assert_has_memory_controller(const std::string& folder) {
    if (!exists(folder)) fail(folder, "find it", errno);
    if (exists(folder + "/memory.limit_in_bytes")) return;
    const UniqueFd file(::open((folder + "/cgroup.subtree_control").c_str(), O_RDONLY | O_CLOEXEC));
    if (!file) fail(folder, "use it: it is no cgroup of the memory controller", EINVAL);
    char text[256] = " ";
    const ssize_t size = ::read(file.get(), text + 1, sizeof text - 2);
    std::string controllers(text, size < 0 ? 1 : static_cast<std::size_t>(size) + 1);
    std::replace(controllers.begin(), controllers.end(), '\n', ' ');
    if (controllers.find(" memory ") == std::string::npos) {
        fail(folder, "use it: write +memory to its cgroup.subtree_control first", EINVAL);
    }
}

/// 0 where the name is not one of ours.
pid_t owner_of(const char* name) {
    const std::string_view prefix = kPrefix;
    if (std::string_view(name).substr(0, prefix.size()) != prefix) return 0;
    char* end = nullptr;
    const long owner = ::strtol(name + prefix.size(), &end, 10);
    return *end == '-' && owner > 0 ? static_cast<pid_t>(owner) : 0;
}

bool is_removed(const std::string& folder) {
    return ::rmdir(folder.c_str()) == 0 || errno == ENOENT;
}

}  // namespace

MemoryCgroup::MemoryCgroup(std::string folder)
    : folder_(std::move(folder)),
      first_version_(has("memory.limit_in_bytes")),
      limits_swap_(has(first_version_ ? "memory.memsw.limit_in_bytes" : "memory.swap.max")),
      limit_(kUnlimited) {
    if (kills() < 0) fail(folder_, "count what the kernel ends: Linux 4.13 is the first that tells", ENOTSUP);
    if (first_version_) {
        write("memory.oom_control", "0");  // inherited: where it is 1, programs would hang at the limit
        if (!limits_swap_) write("memory.swappiness", "0");
    } else if (limits_swap_) {
        write("memory.swap.max", "0");
    }
}

void MemoryCgroup::enter(pid_t process) const {
    write("cgroup.procs", std::to_string(process));
}

void MemoryCgroup::note_rest() {
    at_rest_ = use();
}

void MemoryCgroup::limit(const Limits& limits, std::int64_t files) {
    taken_kills_ = kills();
    at_limit_before_job_ = times_at_limit();
    const auto bytes = at_rest_ + room(limits) + files;
    if (bytes == limit_) return;
    if (bytes < limit_) make_room(bytes);
    write_limit(bytes);
    limit_ = bytes;
}

/// The last program's processes may still be ending, and files that it read be cached. The first version
/// refuses a limit below what it cannot reclaim; the second would end the worker.
void MemoryCgroup::make_room(std::int64_t bytes) const {
    const auto deadline = std::chrono::steady_clock::now() + kPatienceForRoom;
    while (use() > bytes) {
        if (first_version_) {
            if (can_write("memory.limit_in_bytes", std::to_string(bytes))) return;
        } else {
            can_write("memory.reclaim", std::to_string(use() - bytes));
        }
        if (std::chrono::steady_clock::now() > deadline)
            fail(folder_, "lower its limit below its use", EBUSY);
        std::this_thread::sleep_for(kStep);
    }
}

void MemoryCgroup::write_limit(std::int64_t bytes) const {
    const auto memory = std::to_string(bytes);
    const auto memory_and_swap = std::to_string(bytes + kSwap);
    if (!first_version_) return write("memory.max", memory);
    // The second may never be less than the first.
    if (limits_swap_ && bytes > limit_) write("memory.memsw.limit_in_bytes", memory_and_swap);
    write("memory.limit_in_bytes", memory);
    if (limits_swap_ && bytes < limit_) write("memory.memsw.limit_in_bytes", memory_and_swap);
}

/// The kernel counts its kills where the process was that it chose, whoever's limit it was. At a limit
/// further up, or when the machine's memory is used up, our own count of times at the limit stands still.
MemoryCgroup::Kill MemoryCgroup::take_kill() {
    if (kills() <= taken_kills_) return Kill::Nothing;
    ++taken_kills_;
    return times_at_limit() == at_limit_before_job_ ? Kill::ForAnother : Kill::AtOwnLimit;
}

MemoryCgroup::Kill MemoryCgroup::take_all_kills() {
    const auto kill = take_kill();
    taken_kills_ = kills();
    return kill;
}

std::int64_t MemoryCgroup::kills() const {
    return number_after("oom_kill", read(first_version_ ? "memory.oom_control" : "memory.events"));
}

std::int64_t MemoryCgroup::times_at_limit() const {
    return first_version_ ? number_in("memory.failcnt") : number_after("oom", read("memory.events"));
}

std::int64_t MemoryCgroup::use() const {
    return number_in(first_version_ ? "memory.usage_in_bytes" : "memory.current");
}

std::int64_t MemoryCgroup::number_in(const char* file) const {
    return ::strtoll(read(file).c_str(), nullptr, 10);
}

bool MemoryCgroup::has(const char* file) const {
    return exists(folder_ + "/" + file);
}

std::string MemoryCgroup::read(const char* file) const {
    const UniqueFd opened(::open((folder_ + "/" + file).c_str(), O_RDONLY | O_CLOEXEC));
    char text[512];
    const ssize_t size = opened ? ::read(opened.get(), text, sizeof text) : -1;
    if (size < 0) fail(folder_, std::string("read its ") + file, errno);
    return {text, static_cast<std::size_t>(size)};
}

void MemoryCgroup::write(const char* file, const std::string& text) const {
    if (!can_write(file, text)) fail(folder_, "write " + text + " to its " + file, errno);
}

bool MemoryCgroup::can_write(const char* file, const std::string& text) const {
    const UniqueFd opened(::open((folder_ + "/" + file).c_str(), O_WRONLY | O_TRUNC | O_CLOEXEC));
    return opened && ::write(opened.get(), text.data(), text.size()) >= 0;
}

MemoryCgroup::Kill take_kill(std::optional<MemoryCgroup>& cgroup, int wait_status) {
    const bool killed = WIFSIGNALED(wait_status) && WTERMSIG(wait_status) == SIGKILL;
    return cgroup && killed ? cgroup->take_kill() : MemoryCgroup::Kill::Nothing;
}

MemoryCgroup::Kill take_all_kills(std::optional<MemoryCgroup>& cgroup, int wait_status) {
    const auto kill = cgroup ? cgroup->take_all_kills() : MemoryCgroup::Kill::Nothing;
    const bool ended_well = WIFEXITED(wait_status) && WEXITSTATUS(wait_status) == 0;
    return ended_well ? MemoryCgroup::Kill::Nothing : kill;
}

bool is_ended_at_limit(std::optional<MemoryCgroup>& cgroup) {
    try {
        return cgroup && cgroup->take_kill() == MemoryCgroup::Kill::AtOwnLimit;
    } catch (const std::system_error&) {
        return false;
    }
}

MemoryCgroups::MemoryCgroups(std::string folder) : folder_(std::move(folder)) {
    auto* const entries = ::opendir(folder_.c_str());
    if (!entries) return;                                   // `make` will say so
    while (const auto* const entry = ::readdir(entries)) {  // NOLINT(concurrency-mt-unsafe): our own stream
        const pid_t owner = owner_of(entry->d_name);
        // One that still has a process cannot be removed: the owner lives in another pid namespace.
        if (owner && ::kill(owner, 0) != 0 && errno == ESRCH)
            ::rmdir((folder_ + "/" + entry->d_name).c_str());
    }
    ::closedir(entries);
}

MemoryCgroup MemoryCgroups::make() {
    static std::atomic<unsigned> number{0};  // several executors may share the folder
    remove_ended();
    assert_has_memory_controller(folder_);
    while (true) {
        const auto child =
            folder_ + "/" + kPrefix + std::to_string(::getpid()) + "-" + std::to_string(number++);
        if (::mkdir(child.c_str(), 0755) == 0) {
            ended_.push_back(child);  // until it is whole
            MemoryCgroup cgroup(child);
            ended_.pop_back();
            return cgroup;
        }
        if (errno != EEXIST) fail(folder_, "make a cgroup in it", errno);
        ::rmdir(child.c_str());  // of one who had our process id
    }
}

void MemoryCgroups::remove(const MemoryCgroup& cgroup) {
    ended_.push_back(cgroup.folder());
    remove_ended();
}

void MemoryCgroups::remove_ended() {
    ended_.erase(std::remove_if(ended_.begin(), ended_.end(), is_removed), ended_.end());
}

void MemoryCgroups::remove_all() {
    for (int step = 0; !ended_.empty() && step < kStepsUntilEmpty; ++step) {
        if (step) std::this_thread::sleep_for(kStep);
        remove_ended();
    }
}

}  // namespace rlef
