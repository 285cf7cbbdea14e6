#include "isolation.hpp"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <system_error>

#include "must.hpp"
#include "system_calls.hpp"
#include "unique_fd.hpp"

namespace rlef {

const std::array<const char*, kLayers> kLayerNames = {"unprivileged_user", "mount_namespace", "pid_namespace",
                                                      "network_namespace", "ipc_namespace",   "uts_namespace",
                                                      "landlock"};

namespace {

constexpr uid_t kFirstOwnUser = 2'000'000'000;  // plus the pid: a user that nobody else is
constexpr uid_t kNobody = 65534;

std::uint64_t bit(int capability) {
    return std::uint64_t{1} << capability;
}

bool has_capability(int capability) {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    must(::syscall(SYS_capget, &header, data) == 0, "capget");
    return (data[capability / 32].effective >> (capability % 32)) & 1;
}

void keep_capabilities(std::uint64_t kept) {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    for (int word = 0; word < 2; ++word) {
        data[word].permitted = data[word].effective = static_cast<std::uint32_t>(kept >> (32 * word));
    }
    must(::syscall(SYS_capset, &header, data) == 0, "capset");
}

void empty_bounding_set() {
    for (int capability = 0; ::prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; ++capability) {
        must(::prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) == 0, "PR_CAPBSET_DROP");
    }
}

void become(uid_t user) {
    must(::setgroups(0, nullptr) == 0, "setgroups");
    must(::setresgid(user, user, user) == 0, "setresgid");
    must(::setresuid(user, user, user) == 0, "setresuid");
}

/// Does what may have no way back. Returns 0, or the errno of the system_error that it threw.
template <typename Steps>
int try_in_child(Steps steps) {
    const pid_t child = ::fork();
    must(child >= 0, "fork");
    if (child == 0) {
        try {
            steps();
        } catch (const std::system_error& error) {
            ::_exit(error.code().value());
        }
        ::_exit(0);
    }
    int status = 0;
    must(::waitpid(child, &status, 0) == child, "waitpid");
    return WEXITSTATUS(status);
}

void choose_user(Isolation& isolation) {
    isolation.user = ::geteuid();
    if (isolation.user != 0) return;
    int error = EPERM;
    for (const uid_t candidate : {kFirstOwnUser + static_cast<uid_t>(::getpid()), kNobody}) {
        error = try_in_child([candidate] { become(candidate); });
        if (error == 0) {
            isolation.user = candidate;
            isolation.change_user = true;
            isolation.count_processes = candidate != kNobody;
            isolation.processes_of_ours = 1;  // the solution process
            return;
        }
    }
    isolation.errors[static_cast<unsigned>(Layer::UnprivilegedUser)] = error;
}

void write_file(const char* path, const std::string& text) {
    const UniqueFd file(::open(path, O_WRONLY | O_CLOEXEC));
    must(static_cast<bool>(file), path);
    must(::write(file.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()), path);
}

/// RLIMIT_NPROC counts per user namespace since Linux 5.14; before, an ordinary user's other processes count
/// too.
bool kernel_counts_per_namespace() {
    utsname name{};
    if (::uname(&name) != 0) return false;
    char* dot = nullptr;
    const long major = std::strtol(name.release, &dot, 10);
    const long minor = *dot == '.' ? std::strtol(dot + 1, nullptr, 10) : 0;
    return major > 5 || (major == 5 && minor >= 14);
}

void map_own_user() {
    const auto user = std::to_string(::geteuid());
    const auto group = std::to_string(::getegid());
    must(::unshare(CLONE_NEWUSER) == 0, "unshare");
    write_file("/proc/self/setgroups", "deny");
    write_file("/proc/self/uid_map", user + " " + user + " 1");
    write_file("/proc/self/gid_map", group + " " + group + " 1");
}

/// A user namespace of our own, for the right to make the other ones. Some systems grant one that is worth
/// nothing, so a child tries first. Returns 0 or errno.
int enter_user_namespace(Isolation& isolation) {
    const int error = try_in_child([] {
        map_own_user();
        must(::unshare(CLONE_NEWNS) == 0, "unshare");
        must(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0, "make mounts private");
    });
    if (error) return error;
    map_own_user();
    isolation.count_processes = kernel_counts_per_namespace();
    isolation.processes_of_ours = 2;  // the worker and the solution process
    return 0;
}

struct MountAttributes {  // struct mount_attr, which older headers lack
    std::uint64_t set;
    std::uint64_t clear;
    std::uint64_t propagation;
    std::uint64_t user_namespace;
};

constexpr std::uint64_t kReadOnly = 0x1 | 0x2 | 0x4;  // MOUNT_ATTR_RDONLY | NOSUID | NODEV
constexpr std::uint64_t kDevice = 0x1 | 0x2 | 0x8;    // RDONLY (as a file) | NOSUID | NOEXEC
constexpr unsigned kCloneTree = 0x1 | O_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE;
constexpr unsigned kFromDescriptor = 0x4;  // MOVE_MOUNT_F_EMPTY_PATH

void set_attributes(int folder, const char* path, unsigned flags, std::uint64_t set) {
    const MountAttributes attributes{set, 0, 0, 0};
    must(::syscall(SYS_mount_setattr, folder, path, flags, &attributes, sizeof attributes) == 0,
         "mount_setattr");
}

UniqueFd copy_of_mounts(const std::string& path) {
    UniqueFd tree(
        static_cast<int>(::syscall(SYS_open_tree, AT_FDCWD, path.c_str(), kCloneTree & ~AT_EMPTY_PATH)));
    must(static_cast<bool>(tree), ("open_tree " + path).c_str());
    return tree;
}

/// At a place below the current folder.
void attach(const UniqueFd& tree, const char* place) {
    must(::syscall(SYS_move_mount, tree.get(), "", AT_FDCWD, place, kFromDescriptor) == 0, "move_mount");
}

/// "/usr/lib" -> "usr/lib", below the current folder.
const char* relative(const std::string& path) {
    return path.c_str() + 1;
}

void make_place(const std::string& path, bool is_folder) {
    for (auto slash = path.find('/', 1); slash != std::string::npos; slash = path.find('/', slash + 1)) {
        must(::mkdir(relative(path.substr(0, slash)), 0755) == 0 || errno == EEXIST, "mkdir");
    }
    if (is_folder) {
        must(::mkdir(relative(path), 0755) == 0 || errno == EEXIST, "mkdir");
    } else {
        must(static_cast<bool>(UniqueFd(::open(relative(path), O_WRONLY | O_CREAT | O_CLOEXEC, 0644))),
             "open");
    }
}

/// Replaces the root by an empty, read-only one that holds the readable paths and nothing else.
void replace_root(const FileView& view) {
    must(::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0, "make mounts private");
    std::vector<UniqueFd> trees, devices;
    for (const auto& path : view.readable) trees.push_back(copy_of_mounts(path));
    for (const auto& path : view.devices) devices.push_back(copy_of_mounts(path));
    const char* place = view.readable.front().c_str();  // any folder would do; it need not be empty
    const auto* const place_options = "size=1m,mode=755";
    must(::mount("none", place, "tmpfs", MS_NOSUID | MS_NODEV, place_options) == 0, "mount tmpfs");
    must(::chdir(place) == 0, "chdir");
    for (std::size_t i = 0; i < trees.size(); ++i) {
        const auto& path = view.readable[i];
        struct stat facts{};
        must(::fstat(trees[i].get(), &facts) == 0, "fstat");
        make_place(path, S_ISDIR(facts.st_mode));
        attach(trees[i], relative(path));
    }
    for (const auto& path : view.hidden) {
        must(::mount("none", relative(path), "tmpfs", MS_NOSUID | MS_NODEV, "size=4k,mode=755") == 0,
             "mount tmpfs");
    }
    for (const auto& path : view.devices) make_place(path, false);
    if (view.work_folder) make_place(kWorkFolder, true);
    set_attributes(AT_FDCWD, ".", AT_RECURSIVE, kReadOnly);
    for (std::size_t i = 0; i < devices.size(); ++i) {
        set_attributes(devices[i].get(), "", AT_EMPTY_PATH, kDevice);
        attach(devices[i], relative(view.devices[i]));
    }
    must(::syscall(SYS_pivot_root, ".", ".") == 0, "pivot_root");
    must(::umount2(".", MNT_DETACH) == 0, "umount2");
    must(::chdir("/") == 0, "chdir");
}

struct LandlockRuleset {  // struct landlock_ruleset_attr, of which older headers know a part
    std::uint64_t files;
    std::uint64_t network;
    std::uint64_t scoped;
};

struct __attribute__((packed)) LandlockPath {
    std::uint64_t allowed;
    std::int32_t parent;
};

constexpr std::uint64_t kExecute = 1 << 0, kWriteFile = 1 << 1, kReadFile = 1 << 2, kReadFolder = 1 << 3;
constexpr std::uint64_t kTruncate = 1 << 14;  // from version 3

long landlock_version() {
    return ::syscall(SYS_landlock_create_ruleset, nullptr, 0, 1);
}

std::uint64_t file_rights(long version) {
    if (version >= 5) return (1 << 16) - 1;
    if (version >= 3) return (1 << 15) - 1;
    return version == 2 ? (1 << 14) - 1 : (1 << 13) - 1;
}

/// What may be done at a path, and below it.
struct Grant {
    std::string path;
    std::uint64_t on_files;
    std::uint64_t on_folders;
};

/// Nothing but what is granted can be done to files. Returns 0 or errno.
int restrict_files(const std::vector<Grant>& grants) {
    const long version = landlock_version();
    if (version < 0) return errno;
    const auto handled = file_rights(version);
    const LandlockRuleset ruleset{handled, version >= 4 ? 3U : 0U, version >= 6 ? 3U : 0U};
    const std::size_t known = version >= 6 ? 24 : version >= 4 ? 16 : 8;
    const UniqueFd rules(static_cast<int>(::syscall(SYS_landlock_create_ruleset, &ruleset, known, 0)));
    if (!rules) return errno;
    for (const auto& grant : grants) {
        const UniqueFd parent(::open(grant.path.c_str(), O_PATH | O_CLOEXEC));
        must(static_cast<bool>(parent), "open a readable path");
        struct stat facts{};
        must(::fstat(parent.get(), &facts) == 0, "fstat");
        const auto rights = grant.on_files | (S_ISDIR(facts.st_mode) ? grant.on_folders : 0);
        const LandlockPath rule{rights & handled, parent.get()};
        must(::syscall(SYS_landlock_add_rule, rules.get(), 1, &rule, 0) == 0, "landlock_add_rule");
    }
    return ::syscall(SYS_landlock_restrict_self, rules.get(), 0) == 0 ? 0 : errno;
}

std::vector<Grant> grants_of(const FileView& view, std::uint64_t on_files) {
    std::vector<Grant> grants;
    for (const auto& path : view.readable) grants.push_back({path, on_files, kReadFolder});
    for (const auto& path : view.devices) grants.push_back({path, kReadFile | kWriteFile | kTruncate, 0});
    return grants;
}

/// The life of pid 1: nothing, until the worker is gone. Then the kernel ends the namespace's other
/// processes.
[[noreturn]] void be_first_process(const Isolation& isolation, UniqueFd end_of_worker) {
    try {
        drop_privileges(isolation);
        must(::prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0) == 0, "PR_SET_PDEATHSIG");
        must(::dup2(end_of_worker.get(), 0) == 0, "dup2");
        must(::syscall(SYS_close_range, 1, ~0U, 0) == 0, "close_range");
        must(::signal(SIGCHLD, SIG_IGN) != SIG_ERR, "signal");  // orphans leave no zombies
        char nothing;
        while (::read(0, &nothing, 1) != 0) {  // the worker may have been gone before the call above
        }
    } catch (const std::system_error&) {
        ::_exit(1);  // and with it the namespace: the worker will fail to fork
    }
    ::_exit(0);
}

/// A pid namespace for the children to come. Its pid 1 must not be one of them: the kernel withholds from pid
/// 1 the signals that end programs. Returns 0 or errno.
int make_pid_namespace(const Isolation& isolation) {
    if (::unshare(CLONE_NEWPID) != 0) return errno;
    int ends[2];
    must(::pipe2(ends, O_CLOEXEC) == 0, "pipe2");
    UniqueFd end_of_worker(ends[0]);
    static UniqueFd open_while_we_live;
    open_while_we_live = UniqueFd(ends[1]);
    const pid_t first = ::fork();
    must(first >= 0, "fork");
    if (first == 0) {
        open_while_we_live = UniqueFd();
        be_first_process(isolation, std::move(end_of_worker));
    }
    return 0;
}

struct NamespaceLayer {
    Layer layer;
    int flag;
};

constexpr NamespaceLayer kUnshared[] = {
    {Layer::MountNamespace, CLONE_NEWNS},
    {Layer::NetworkNamespace, CLONE_NEWNET},
    {Layer::IpcNamespace, CLONE_NEWIPC},
    {Layer::UtsNamespace, CLONE_NEWUTS},
};

void enter_namespaces(Isolation& isolation) {
    const int refused = has_capability(CAP_SYS_ADMIN) ? 0 : enter_user_namespace(isolation);
    for (const auto& [layer, flag] : kUnshared) {
        isolation.errors[static_cast<unsigned>(layer)] = refused ? refused : ::unshare(flag) == 0 ? 0 : errno;
    }
    const int pid_error = refused ? refused : make_pid_namespace(isolation);
    isolation.errors[static_cast<unsigned>(Layer::PidNamespace)] = pid_error;
    isolation.pid_namespace = pid_error == 0;
    if (isolation.pid_namespace) ++isolation.processes_of_ours;
}

/// All but Landlock and the rights that are left.
Isolation isolate_from_the_machine(const FileView& view) {
    Isolation isolation;
    choose_user(isolation);
    if (isolation.change_user && !has_capability(CAP_SYS_ADMIN)) {  // root of a container: leave it now
        become(isolation.user);
        must(::prctl(PR_SET_DUMPABLE, 1, 0, 0, 0) == 0,
             "PR_SET_DUMPABLE");  // or our own /proc is closed to us
        isolation.change_user = false;
        isolation.processes_of_ours = 2;
    }
    enter_namespaces(isolation);
    if (holds(isolation, Layer::MountNamespace)) replace_root(view);
    must(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0, "PR_SET_NO_NEW_PRIVS");
    return isolation;
}

/// Keeps what solution processes need to change their user, and `besides`.
void give_up_rights(const Isolation& isolation, std::uint64_t besides) {
    if (has_capability(CAP_SETPCAP)) empty_bounding_set();
    // CAP_KILL: without it the kernel would not let this process's death reach children of another user.
    const auto changing = bit(CAP_SETUID) | bit(CAP_SETGID) | bit(CAP_KILL);
    keep_capabilities((isolation.change_user ? changing : 0) | besides);
}

}  // namespace

bool holds(const Isolation& isolation, Layer layer) {
    return isolation.errors[static_cast<unsigned>(layer)] == 0;
}

Isolation isolate(const FileView& view) {
    auto isolation = isolate_from_the_machine(view);
    isolation.errors[static_cast<unsigned>(Layer::Landlock)] = restrict_files(grants_of(view, kReadFile));
    give_up_rights(isolation, 0);
    return isolation;
}

Isolation isolate_for_commands(const FileView& view) {
    auto isolation = isolate_from_the_machine(view);
    isolation.errors[static_cast<unsigned>(Layer::Landlock)] = landlock_version() < 0 ? errno : 0;
    give_up_rights(isolation, holds(isolation, Layer::MountNamespace) ? bit(CAP_SYS_ADMIN) : 0);
    return isolation;
}

void restrict_files_of_command(const Isolation& isolation, const FileView& view, bool is_writable) {
    if (!holds(isolation, Layer::Landlock)) return;
    auto grants = grants_of(view, kReadFile | kExecute);
    if (holds(isolation, Layer::MountNamespace)) {
        const auto everything = ~std::uint64_t{0};
        grants.push_back({kWorkFolder, is_writable ? everything : kReadFile | kExecute,
                          is_writable ? everything : kReadFolder});
    }
    const int error = restrict_files(grants);
    if (error) throw std::system_error(error, std::generic_category(), "Landlock");
}

void drop_privileges(const Isolation& isolation) {
    if (isolation.change_user) become(isolation.user);
    keep_capabilities(0);
}

}  // namespace rlef
