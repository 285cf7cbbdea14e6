#include "policy.hpp"

#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <utility>

namespace rlef {
namespace {

constexpr std::uint32_t kAllow = SECCOMP_RET_ALLOW;
constexpr std::uint32_t kKill = SECCOMP_RET_KILL_PROCESS;

constexpr std::uint32_t refuse(int error) {
    return SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(error);
}

constexpr std::uint32_t audit_number(Architecture architecture) {
    return architecture == Architecture::X86_64 ? AUDIT_ARCH_X86_64 : AUDIT_ARCH_AARCH64;
}

constexpr std::uint32_t first_alien(Architecture architecture) {
    // x32: the same machine's calls by other numbers
    return architecture == Architecture::X86_64 ? 0x40000000 : 0x80000000;
}

constexpr std::uint32_t kNewNamespaces =
    CLONE_NEWNS | CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP | CLONE_NEWPID;
constexpr std::uint32_t kWriting = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
constexpr std::uint32_t kNameMapping = 0x53564d41;  // PR_SET_VMA

constexpr SystemCall kHarmless[] = {
    // memory
    call::brk,
    call::madvise,
    call::membarrier,
    call::mmap,
    call::mprotect,
    call::mremap,
    call::msync,
    call::munmap,
    // descriptors that are open already
    call::close,
    call::close_range,
    call::dup,
    call::dup3,
    call::fadvise64,
    call::fdatasync,
    call::fstat,
    call::fstatfs,
    call::fsync,
    call::ftruncate,
    call::lseek,
    call::pread64,
    call::preadv,
    call::preadv2,
    call::pwrite64,
    call::pwritev,
    call::pwritev2,
    call::read,
    call::readv,
    call::write,
    call::writev,
    // looking at files; writing is refused below
    call::chdir,
    call::faccessat,
    call::faccessat2,
    call::fchdir,
    call::getcwd,
    call::getdents64,
    call::newfstatat,
    call::readlinkat,
    call::statfs,
    call::statx,
    call::umask,
    // waiting, and talking to oneself
    call::epoll_create1,
    call::epoll_ctl,
    call::epoll_pwait,
    call::eventfd2,
    call::getsockname,
    call::getsockopt,
    call::pipe2,
    call::ppoll,
    call::pselect6,
    call::recvfrom,
    call::recvmsg,
    call::sendmsg,
    call::shutdown,
    // clocks
    call::clock_getres,
    call::clock_gettime,
    call::clock_nanosleep,
    call::getitimer,
    call::gettimeofday,
    call::nanosleep,
    call::setitimer,
    call::times,
    // threads and scheduling
    call::exit,
    call::exit_group,
    call::futex,
    call::get_robust_list,
    call::getcpu,
    call::rseq,
    call::sched_get_priority_max,
    call::sched_get_priority_min,
    call::sched_getaffinity,
    call::sched_getparam,
    call::sched_getscheduler,
    call::sched_yield,
    call::set_robust_list,
    call::set_tid_address,
    // signals
    call::kill,
    call::restart_syscall,
    call::rt_sigaction,
    call::rt_sigpending,
    call::rt_sigprocmask,
    call::rt_sigreturn,
    call::rt_sigsuspend,
    call::rt_sigtimedwait,
    call::sigaltstack,
    call::tgkill,
    call::tkill,
    // facts about oneself and the machine
    call::capget,
    call::getegid,
    call::geteuid,
    call::getgid,
    call::getgroups,
    call::getpgid,
    call::getpid,
    call::getppid,
    call::getpriority,
    call::getrandom,
    call::getresgid,
    call::getresuid,
    call::getrusage,
    call::getsid,
    call::gettid,
    call::getuid,
    call::prlimit64,
    call::sysinfo,
    call::uname,
    // what workers and solution processes need to make and watch tests
    call::capset,
    call::pidfd_open,
    call::seccomp,
    call::setgroups,
    call::setresgid,
    call::setresuid,
    call::wait4,
    call::waitid,
    // older forms of the same, most of which only x86-64 has
    call::access,
    call::alarm,
    call::dup2,
    call::epoll_create,
    call::epoll_wait,
    call::eventfd,
    call::getdents,
    call::getpgrp,
    call::getrlimit,
    call::lstat,
    call::pause,
    call::pipe,
    call::poll,
    call::readlink,
    call::select,
    call::setrlimit,
    call::stat,
    call::time,
};

/// No honest program gets here: the process is killed, and the verdict is `security`.
constexpr SystemCall kHostile[] = {
    // other programs, other processes
    call::execve,
    call::execveat,
    call::ptrace,
    call::process_vm_readv,
    call::process_vm_writev,
    call::kcmp,
    call::pidfd_getfd,
    call::pidfd_send_signal,
    // the outside world
    call::accept,
    call::accept4,
    call::bind,
    call::connect,
    call::listen,
    // file systems and namespaces
    call::chroot,
    call::fsmount,
    call::fsopen,
    call::mount,
    call::mount_setattr,
    call::move_mount,
    call::name_to_handle_at,
    call::open_by_handle_at,
    call::open_tree,
    call::pivot_root,
    call::quotactl,
    call::setns,
    call::swapoff,
    call::swapon,
    call::umount2,
    call::unshare,
    // the kernel itself
    call::acct,
    call::add_key,
    call::adjtimex,
    call::bpf,
    call::clock_adjtime,
    call::clock_settime,
    call::delete_module,
    call::finit_module,
    call::init_module,
    call::io_setup,
    call::io_uring_enter,
    call::io_uring_register,
    call::io_uring_setup,
    call::kexec_load,
    call::keyctl,
    call::perf_event_open,
    call::personality,
    call::reboot,
    call::request_key,
    call::setdomainname,
    call::sethostname,
    call::settimeofday,
    call::syslog,
    call::userfaultfd,
    call::vhangup,
    call::ioperm,
    call::iopl,
    call::kexec_file_load,
    call::modify_ldt,
};

/// What changes files. Where they may not be changed, no rule names these.
constexpr SystemCall kWritingFiles[] = {
    call::chmod,     call::copy_file_range, call::creat,    call::fallocate,       call::fchmod,
    call::fchmodat,  call::fchmodat2,       call::flock,    call::futimesat,       call::link,
    call::linkat,    call::mkdir,           call::mkdirat,  call::rename,          call::renameat,
    call::renameat2, call::rmdir,           call::sendfile, call::symlink,         call::symlinkat,
    call::truncate,  call::unlink,          call::unlinkat, call::sync_file_range, call::utime,
    call::utimensat, call::utimes,
};

/// Run-time systems try these first, and do without.
constexpr SystemCall kTried[] = {
    call::io_setup,
    call::io_uring_enter,
    call::io_uring_register,
    call::io_uring_setup,
};

/// Tools that copy or list files ask for these, and take it well when the file system has none.
constexpr SystemCall kExtendedAttributes[] = {
    call::getxattr, call::lgetxattr, call::fgetxattr, call::listxattr, call::llistxattr, call::flistxattr,
};

/// Calls that depend on an argument.
std::vector<Rule> conditions(Architecture architecture) {
    const auto on = [architecture](const SystemCall& call) { return call.on(architecture); };
    return {
        // glibc falls back to clone, whose flags a filter can read
        {on(call::clone3), refuse(ENOSYS)},
        {on(call::clone), kAllow, When::LacksBits, 0, kNewNamespaces, {}, kKill},
        {on(call::openat), kAllow, When::LacksBits, 2, kWriting, {}, refuse(EROFS)},
        {on(call::open), kAllow, When::LacksBits, 1, kWriting, {}, refuse(EROFS)},
        // the user database asks a name service by a local socket, and takes no for an answer
        {on(call::socket), refuse(EPERM), When::Equal, 0, AF_UNIX, {}, kKill},
        {on(call::socketpair), kAllow, When::Equal, 0, AF_UNIX, {}, refuse(EPERM)},
        {on(call::sendto), kAllow, When::IsNull, 4, 0, {}, refuse(EPERM)},
        {on(call::fcntl),
         kAllow,
         When::OneOf,
         1,
         0,
         {F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETPIPE_SZ, F_GET_SEALS},
         refuse(EPERM)},
        {on(call::ioctl),
         kAllow,
         When::OneOf,
         1,
         0,
         {TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX},
         refuse(ENOTTY)},
        {on(call::prctl),
         kAllow,
         When::OneOf,
         0,
         0,
         {PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_CAPBSET_READ, kNameMapping},
         refuse(EPERM)},
    };
}

/// What a rule already says of the same call does not count any more.
void replace(Policy& policy, const Rule& rule) {
    auto& rules = policy.rules;
    const auto found = std::find_if(rules.begin(), rules.end(),
                                    [&rule](const Rule& known) { return known.number == rule.number; });
    if (found != rules.end()) {
        *found = rule;
    } else {
        rules.push_back(rule);
    }
}

Policy without_absent(Policy policy) {
    auto& rules = policy.rules;
    rules.erase(
        std::remove_if(rules.begin(), rules.end(), [](const Rule& rule) { return rule.number == kAbsent; }),
        rules.end());
    return policy;
}

}  // namespace

Policy worker_policy(Architecture architecture) {
    Policy policy{conditions(architecture), refuse(EPERM), refuse(ENOSYS), first_alien(architecture),
                  audit_number(architecture)};
    for (const auto& call : kHarmless) policy.rules.push_back({call.on(architecture), kAllow});
    for (const auto& call : kHostile) policy.rules.push_back({call.on(architecture), kKill});
    return without_absent(std::move(policy));
}

Policy test_policy(pid_t own_pid, Architecture architecture, bool may_fork) {
    const auto on = [architecture](const SystemCall& call) { return call.on(architecture); };
    const auto self = static_cast<std::uint32_t>(own_pid);
    Policy policy{
        {
            {on(call::kill), kAllow, When::Equal, 0, self, {}, refuse(EPERM)},
            {on(call::tgkill), kAllow, When::Equal, 0, self, {}, refuse(EPERM)},
            {on(call::tkill), refuse(EPERM)},
            {on(call::prlimit64), kAllow, When::Equal, 0, 0, {}, refuse(EPERM)},
            {on(call::prctl),
             kAllow,
             When::OneOf,
             0,
             0,
             {PR_SET_NAME, PR_GET_NAME, kNameMapping},
             refuse(EPERM)},
            {on(call::seccomp), refuse(EPERM)},
            {on(call::pidfd_open), refuse(EPERM)},
            // what was shared stays until the last page of the map goes, unseen by any limit
            {on(call::mmap), refuse(EPERM), When::HasBits, 3, MAP_SHARED | MAP_ANONYMOUS, {}, kAllow},
            // urgent data: no program needs it, and it has led into the kernel from sandboxes before
            {on(call::sendto), kAllow, When::LacksBits, 3, MSG_OOB, {}, refuse(EPERM)},
            {on(call::recvfrom), kAllow, When::LacksBits, 3, MSG_OOB, {}, refuse(EPERM)},
            {on(call::sendmsg), refuse(EPERM)},
            {on(call::recvmsg), refuse(EPERM)},
            {on(call::capset), refuse(EPERM)},
            {on(call::setgroups), refuse(EPERM)},
            {on(call::setresuid), refuse(EPERM)},
            {on(call::setresgid), refuse(EPERM)},
        },
        kAllow,
        kAllow,
        first_alien(architecture),
        0,  // the first filter has checked the architecture
    };
    if (!may_fork) {
        policy.rules.push_back({on(call::clone), kAllow, When::HasBits, 0, CLONE_THREAD, {}, refuse(EAGAIN)});
        policy.rules.push_back({on(call::fork), refuse(EAGAIN)});
        policy.rules.push_back({on(call::vfork), refuse(EAGAIN)});
    }
    return without_absent(std::move(policy));
}

Policy command_policy(CommandRights rights, Architecture architecture) {
    const auto on = [architecture](const SystemCall& call) { return call.on(architecture); };
    auto policy = worker_policy(architecture);
    constexpr std::uint32_t kSetThreadArea = 0x1002, kGetThreadArea = 0x1003;  // ARCH_SET_FS, ARCH_GET_FS
    for (const auto& call : {call::execve, call::execveat, call::mincore})
        replace(policy, {on(call), kAllow});
    for (const auto& call : kExtendedAttributes) replace(policy, {on(call), refuse(EOPNOTSUPP)});
    for (const auto& call : kTried) replace(policy, {on(call), refuse(ENOSYS)});
    replace(
        policy,
        {on(call::arch_prctl), kAllow, When::OneOf, 0, 0, {kSetThreadArea, kGetThreadArea}, refuse(EINVAL)});
    replace(policy, {on(call::socket), refuse(EAFNOSUPPORT)});  // Java looks which kinds there are
    if (rights.fork) {
        for (const auto& call : {call::fork, call::vfork}) replace(policy, {on(call), kAllow});
    }
    if (rights.write) {
        for (const auto& call : {call::open, call::openat}) replace(policy, {on(call), kAllow});
        for (const auto& call : kWritingFiles) replace(policy, {on(call), kAllow});
    }
    return without_absent(std::move(policy));
}

TestFilter::TestFilter(Architecture architecture) : code_(compile(test_policy(1, architecture))) {
    const auto other = compile(test_policy(2, architecture));
    for (std::size_t i = 0; i < code_.size(); ++i) {
        if (code_[i].k != other.at(i).k) compared_with_pid_.push_back(i);
    }
}

const std::vector<sock_filter>& TestFilter::of(pid_t own_pid) {
    for (const auto place : compared_with_pid_) code_[place].k = static_cast<std::uint32_t>(own_pid);
    return code_;
}

}  // namespace rlef
