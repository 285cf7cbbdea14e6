#pragma once

#include <sys/resource.h>
#include <sys/types.h>
#include <time.h>

#include <atomic>
#include <cstdint>
#include <new>
#include <string>
#include <string_view>

#include "limits.hpp"
#include "message.hpp"

// What the processes of both kinds of workers have in common. All functions throw std::system_error.
namespace rlef {

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr int kSetupFailed = 250;  // exit status of a test process that could not be isolated
// Stacks of threads are reserved, not used: programs that ask for a large one must get it. What is really
// used counts against the memory limit.
constexpr std::int64_t kStackRoom = std::int64_t{640} << 20;

std::int64_t read_clock(clockid_t clock);  // in nanoseconds, as all times here
std::int64_t cpu_time(const rusage& usage);
/// By getrusage: the process's CPU clock may be a tick behind when the process itself asks.
std::int64_t own_cpu_time();
/// For RLIMIT_CPU: whole seconds, after which the kernel itself ends what passes its limit of CPU time.
rlim_t cpu_seconds(std::int64_t nanoseconds);

void limit(__rlimit_resource resource, rlim_t most);
/// The soft limit only: what a program may raise again, as on any machine.
void limit_softly(__rlimit_resource resource, rlim_t most);

/// Dies with the parent from now on; at once if it is dead already. `parent` is 0 where it cannot be seen.
void die_with(pid_t parent);

/// What a child tells its parents, through memory that all see, before its program runs. The program cannot
/// reach it: the test process unmaps it first, or becomes another program.
struct Beginning {
    std::atomic<bool> compiled;
    std::atomic<bool> isolated;
    std::atomic<bool> reported;         // why there is no program to run
    std::atomic<int> execute_error;     // errno, when a command could not be executed
    std::atomic<std::int64_t> cpu_ns;   // of the process when its program began
    std::atomic<std::int64_t> time_ns;  // on the monotonic clock
};

/// The last thing that a test process does before its program: starts the clocks.
void begin(Beginning& beginning);

/// Waits for the test to end, and ends it when one of its clocks runs out. Leaves the process when the
/// supervisor is gone; the test dies with it.
Report::Stopped watch(int socket, pid_t test, const Limits& limits, const Beginning& beginning);

/// The whole content of a file, wherever its offset is.
std::string read_whole(int file);

/// Writes all of it at the file's offset. `step` names it in an error.
void write_whole(int file, std::string_view bytes, const std::string& step);

/// A field of /proc/self/statm, in bytes.
std::int64_t statm_field(int index);

/// What a worker does first: closes what it was not given, and limits what no program may have.
void prepare_worker();

/// Pages that children share.
void* shared_pages(std::size_t bytes);

template <typename Record>
Record* shared() {
    return new (shared_pages(sizeof(Record))) Record{};  // NOLINT(cppcoreguidelines-owning-memory): for life
}

}  // namespace rlef
