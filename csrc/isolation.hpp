#pragma once

#include <sys/types.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

namespace rlef {

/// A layer that a machine may lack. Seccomp, NO_NEW_PRIVS and resource limits are not among them: without
/// those nothing runs.
enum class Layer : unsigned {
    UnprivilegedUser,
    MountNamespace,
    PidNamespace,
    NetworkNamespace,
    IpcNamespace,
    UtsNamespace,
    Landlock,
};

constexpr std::size_t kLayers = 7;
extern const std::array<const char*, kLayers> kLayerNames;

/// Per layer: 0 when it holds, else the errno with which the kernel refused it.
using LayerErrors = std::array<std::int32_t, kLayers>;

/// What a program may read: the standard library and the shared libraries it needs.
struct FileView {
    std::vector<std::string> readable;      // existing absolute paths; the first is a folder
    std::vector<std::string> hidden;        // folders below them that appear empty (installed packages)
    std::vector<std::string> devices = {};  // that commands may read and write
    bool work_folder = false;               // an empty folder at kWorkFolder, to mount one on
};

/// Where commands find their files, if they have a mount namespace.
constexpr auto kWorkFolder = "/box";

/// What a worker became.
struct Isolation {
    LayerErrors errors{};
    uid_t user = 0;                // of the programs
    bool change_user = false;      // solution processes still have to become `user`
    bool pid_namespace = false;    // children are in it, but not the worker itself
    bool count_processes = false;  // RLIMIT_NPROC would count this worker's processes only
    int processes_of_ours = 0;     // among those it would count
};

/// Isolates the calling, single-threaded process for good: everything but the system call filter.
/// Throws std::system_error when a step fails that is not a layer.
Isolation isolate(const FileView& view);

/// The same for a worker that runs commands. It keeps the right to mount, and leaves it to each test to
/// restrict its files: who is restricted cannot mount.
Isolation isolate_for_commands(const FileView& view);

/// In a command's test process: Landlock, where there is such. It may read and execute what it sees, and
/// write in the working folder if that `is_writable`. Throws std::system_error.
void restrict_files_of_command(const Isolation& isolation, const FileView& view, bool is_writable);

/// In a solution or test process: gives up what the worker had kept. Throws std::system_error.
void drop_privileges(const Isolation& isolation);

bool holds(const Isolation& isolation, Layer layer);

}  // namespace rlef
