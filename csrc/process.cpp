#include "process.hpp"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <system_error>

#include "must.hpp"
#include "system_calls.hpp"
#include "unique_fd.hpp"

namespace rlef {
namespace {

constexpr std::int64_t kShortestSleep = 1'000'000;
constexpr rlim_t kSpareSeconds = 2;

std::int64_t nanoseconds(const timespec& time) {
    return time.tv_sec * kSecond + time.tv_nsec;
}
std::int64_t nanoseconds(const timeval& time) {
    return time.tv_sec * kSecond + time.tv_usec * 1000;
}

}  // namespace

std::int64_t read_clock(clockid_t clock) {
    timespec time{};
    must(::clock_gettime(clock, &time) == 0, "clock_gettime");
    return nanoseconds(time);
}

std::int64_t cpu_time(const rusage& usage) {
    return nanoseconds(usage.ru_utime) + nanoseconds(usage.ru_stime);
}

std::int64_t own_cpu_time() {
    rusage usage{};
    must(::getrusage(RUSAGE_SELF, &usage) == 0, "getrusage");
    return cpu_time(usage);
}

rlim_t cpu_seconds(std::int64_t nanoseconds) {
    return static_cast<rlim_t>(nanoseconds / kSecond) + kSpareSeconds;
}

void limit(__rlimit_resource resource, rlim_t most) {
    const rlimit both{most, most};
    must(::setrlimit(resource, &both) == 0, "setrlimit");
}

void limit_softly(__rlimit_resource resource, rlim_t most) {
    rlimit both{};
    must(::getrlimit(resource, &both) == 0, "getrlimit");
    both.rlim_cur = std::min(most, both.rlim_max);
    must(::setrlimit(resource, &both) == 0, "setrlimit");
}

void die_with(pid_t parent) {
    must(::prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0, "PR_SET_PDEATHSIG");
    if (parent && ::getppid() != parent) ::_exit(0);
}

void begin(Beginning& beginning) {
    beginning.cpu_ns = own_cpu_time();
    beginning.time_ns = read_clock(CLOCK_MONOTONIC);
    beginning.isolated = true;
}

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
        if (ready > 0 && events[1].revents) ::_exit(0);
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

std::string read_whole(int file) {
    struct stat facts{};
    must(::fstat(file, &facts) == 0, "fstat");
    std::string text(static_cast<std::size_t>(facts.st_size), '\0');
    for (std::size_t at = 0; at < text.size();) {
        const ssize_t size = ::pread(file, &text[at], text.size() - at, static_cast<off_t>(at));
        must(size > 0, "read a file that the supervisor sent");
        at += static_cast<std::size_t>(size);
    }
    return text;
}

void write_whole(int file, std::string_view bytes, const std::string& step) {
    while (!bytes.empty()) {
        const ssize_t size = ::write(file, bytes.data(), bytes.size());
        must(size > 0 || errno == EINTR, step.c_str());
        if (size > 0) bytes.remove_prefix(static_cast<std::size_t>(size));
    }
}

std::int64_t statm_field(int index) {
    std::ifstream file("/proc/self/statm");
    std::int64_t pages = 0;
    for (int i = 0; i <= index; ++i) file >> pages;
    if (!file) throw std::system_error(EIO, std::generic_category(), "/proc/self/statm");
    return pages * ::sysconf(_SC_PAGESIZE);
}

void prepare_worker() {
    must(::syscall(SYS_close_range, 4, ~0U, 0) == 0, "close_range");
    limit(RLIMIT_CORE, 0);
    limit(RLIMIT_MSGQUEUE, 0);
    limit(RLIMIT_MEMLOCK, 0);
    // The interpreter ignores these two.
    for (const int number : {SIGPIPE, SIGXFSZ}) must(::signal(number, SIG_DFL) != SIG_ERR, "signal");
    std::ofstream("/proc/self/oom_score_adj")
        << 1000;  // best effort: before the trainer, should the kernel choose
}

void* shared_pages(std::size_t bytes) {
    void* pages = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    must(pages != MAP_FAILED, "mmap");
    return pages;
}

}  // namespace rlef
