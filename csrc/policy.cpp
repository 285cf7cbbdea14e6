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

#include "system_calls.hpp"

namespace rlef {
namespace {

constexpr std::uint32_t kAllow = SECCOMP_RET_ALLOW;
constexpr std::uint32_t kKill = SECCOMP_RET_KILL_PROCESS;

constexpr std::uint32_t refuse(int error) {
    return SECCOMP_RET_ERRNO | static_cast<std::uint32_t>(error);
}

#if defined(__x86_64__)
constexpr std::uint32_t kArchitecture = AUDIT_ARCH_X86_64;
constexpr std::uint32_t kFirstAlien = 0x40000000;  // x32: the same machine's calls by other numbers
#elif defined(__aarch64__)
constexpr std::uint32_t kArchitecture = AUDIT_ARCH_AARCH64;
constexpr std::uint32_t kFirstAlien = 0x80000000;
#else
#error "rlef_sandbox has a system call policy for x86-64 and aarch64 only"
#endif

constexpr std::uint32_t kNewNamespaces =
    CLONE_NEWNS | CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;
constexpr std::uint32_t kWriting = O_WRONLY | O_RDWR | O_CREAT | O_TRUNC;
constexpr std::uint32_t kNameMapping = 0x53564d41;  // PR_SET_VMA

constexpr std::uint32_t kHarmless[] = {
    // memory
    SYS_brk,
    SYS_madvise,
    SYS_membarrier,
    SYS_mmap,
    SYS_mprotect,
    SYS_mremap,
    SYS_msync,
    SYS_munmap,
    // descriptors that are open already
    SYS_close,
    SYS_close_range,
    SYS_dup,
    SYS_dup3,
    SYS_fadvise64,
    SYS_fdatasync,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_ftruncate,
    SYS_lseek,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_read,
    SYS_readv,
    SYS_write,
    SYS_writev,
    // looking at files; writing is refused below
    SYS_chdir,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fchdir,
    SYS_getcwd,
    SYS_getdents64,
    SYS_newfstatat,
    SYS_readlinkat,
    SYS_statfs,
    SYS_statx,
    SYS_umask,
    // waiting, and talking to oneself
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_pipe2,
    SYS_ppoll,
    SYS_pselect6,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendmsg,
    SYS_shutdown,
    // clocks
    SYS_clock_getres,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_getitimer,
    SYS_gettimeofday,
    SYS_nanosleep,
    SYS_setitimer,
    SYS_times,
    // threads and scheduling
    SYS_exit,
    SYS_exit_group,
    SYS_futex,
    SYS_get_robust_list,
    SYS_getcpu,
    SYS_rseq,
    SYS_sched_get_priority_max,
    SYS_sched_get_priority_min,
    SYS_sched_getaffinity,
    SYS_sched_getparam,
    SYS_sched_getscheduler,
    SYS_sched_yield,
    SYS_set_robust_list,
    SYS_set_tid_address,
    // signals
    SYS_kill,
    SYS_restart_syscall,
    SYS_rt_sigaction,
    SYS_rt_sigpending,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_rt_sigsuspend,
    SYS_rt_sigtimedwait,
    SYS_sigaltstack,
    SYS_tgkill,
    SYS_tkill,
    // facts about oneself and the machine
    SYS_capget,
    SYS_getegid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getgroups,
    SYS_getpgid,
    SYS_getpid,
    SYS_getppid,
    SYS_getpriority,
    SYS_getrandom,
    SYS_getresgid,
    SYS_getresuid,
    SYS_getrusage,
    SYS_getsid,
    SYS_gettid,
    SYS_getuid,
    SYS_prlimit64,
    SYS_sysinfo,
    SYS_uname,
    // what a solution process needs to make and watch its tests
    SYS_capset,
    SYS_pidfd_open,
    SYS_seccomp,
    SYS_setgroups,
    SYS_setresgid,
    SYS_setresuid,
    SYS_wait4,
    SYS_waitid,
#if defined(__x86_64__)
    // older forms of the same
    SYS_access,
    SYS_alarm,
    SYS_dup2,
    SYS_epoll_create,
    SYS_epoll_wait,
    SYS_eventfd,
    SYS_getdents,
    SYS_getpgrp,
    SYS_getrlimit,
    SYS_lstat,
    SYS_pause,
    SYS_pipe,
    SYS_poll,
    SYS_readlink,
    SYS_select,
    SYS_setrlimit,
    SYS_stat,
    SYS_time,
#endif
};

/// No honest program gets here: the process is killed, and the verdict is `security`.
constexpr std::uint32_t kHostile[] = {
    // other programs, other processes
    SYS_execve,
    SYS_execveat,
    SYS_ptrace,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_kcmp,
    SYS_pidfd_getfd,
    SYS_pidfd_send_signal,
    // the outside world
    SYS_accept,
    SYS_accept4,
    SYS_bind,
    SYS_connect,
    SYS_listen,
    // file systems and namespaces
    SYS_chroot,
    SYS_fsmount,
    SYS_fsopen,
    SYS_mount,
    SYS_mount_setattr,
    SYS_move_mount,
    SYS_name_to_handle_at,
    SYS_open_by_handle_at,
    SYS_open_tree,
    SYS_pivot_root,
    SYS_quotactl,
    SYS_setns,
    SYS_swapoff,
    SYS_swapon,
    SYS_umount2,
    SYS_unshare,
    // the kernel itself
    SYS_acct,
    SYS_add_key,
    SYS_adjtimex,
    SYS_bpf,
    SYS_clock_adjtime,
    SYS_clock_settime,
    SYS_delete_module,
    SYS_finit_module,
    SYS_init_module,
    SYS_io_setup,
    SYS_io_uring_enter,
    SYS_io_uring_register,
    SYS_io_uring_setup,
    SYS_kexec_load,
    SYS_keyctl,
    SYS_perf_event_open,
    SYS_personality,
    SYS_reboot,
    SYS_request_key,
    SYS_setdomainname,
    SYS_sethostname,
    SYS_settimeofday,
    SYS_syslog,
    SYS_userfaultfd,
    SYS_vhangup,
#if defined(__x86_64__)
    SYS_ioperm,
    SYS_iopl,
    SYS_kexec_file_load,
    SYS_modify_ldt,
#endif
};

/// Calls that depend on an argument.
std::vector<Rule> conditions() {
    return {
        // glibc falls back to clone, whose flags a filter can read
        {SYS_clone3, refuse(ENOSYS)},
        {SYS_clone, kAllow, When::LacksBits, 0, kNewNamespaces, {}, kKill},
        {SYS_openat, kAllow, When::LacksBits, 2, kWriting, {}, refuse(EROFS)},
#if defined(__x86_64__)
        {SYS_open, kAllow, When::LacksBits, 1, kWriting, {}, refuse(EROFS)},
#endif
        // the user database asks a name service by a local socket, and takes no for an answer
        {SYS_socket, refuse(EPERM), When::Equal, 0, AF_UNIX, {}, kKill},
        {SYS_socketpair, kAllow, When::Equal, 0, AF_UNIX, {}, refuse(EPERM)},
        {SYS_sendto, kAllow, When::IsNull, 4, 0, {}, refuse(EPERM)},
        {SYS_fcntl,
         kAllow,
         When::OneOf,
         1,
         0,
         {F_DUPFD, F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_GETPIPE_SZ, F_GET_SEALS},
         refuse(EPERM)},
        {SYS_ioctl,
         kAllow,
         When::OneOf,
         1,
         0,
         {TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIOCLEX, FIONCLEX},
         refuse(ENOTTY)},
        {SYS_prctl,
         kAllow,
         When::OneOf,
         0,
         0,
         {PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_CAPBSET_READ, kNameMapping},
         refuse(EPERM)},
    };
}

}  // namespace

Policy worker_policy() {
    Policy policy{conditions(), refuse(EPERM), refuse(ENOSYS), kFirstAlien, kArchitecture};
    for (const auto number : kHarmless) policy.rules.push_back({number, kAllow});
    for (const auto number : kHostile) policy.rules.push_back({number, kKill});
    return policy;
}

Policy test_policy(pid_t own_pid) {
    const auto self = static_cast<std::uint32_t>(own_pid);
    return {
        {
            {SYS_clone, kAllow, When::HasBits, 0, CLONE_THREAD, {}, refuse(EAGAIN)},
#if defined(__x86_64__)
            {SYS_fork, refuse(EAGAIN)},
            {SYS_vfork, refuse(EAGAIN)},
#endif
            {SYS_kill, kAllow, When::Equal, 0, self, {}, refuse(EPERM)},
            {SYS_tgkill, kAllow, When::Equal, 0, self, {}, refuse(EPERM)},
            {SYS_tkill, refuse(EPERM)},
            {SYS_prlimit64, kAllow, When::Equal, 0, 0, {}, refuse(EPERM)},
            {SYS_prctl, kAllow, When::OneOf, 0, 0, {PR_SET_NAME, PR_GET_NAME, kNameMapping}, refuse(EPERM)},
            {SYS_seccomp, refuse(EPERM)},
            {SYS_pidfd_open, refuse(EPERM)},
            // what was shared stays until the last page of the map goes, unseen by any limit
            {SYS_mmap, refuse(EPERM), When::HasBits, 3, MAP_SHARED | MAP_ANONYMOUS, {}, kAllow},
            // urgent data: no program needs it, and it has led into the kernel from sandboxes before
            {SYS_sendto, kAllow, When::LacksBits, 3, MSG_OOB, {}, refuse(EPERM)},
            {SYS_recvfrom, kAllow, When::LacksBits, 3, MSG_OOB, {}, refuse(EPERM)},
            {SYS_sendmsg, refuse(EPERM)},
            {SYS_recvmsg, refuse(EPERM)},
            {SYS_capset, refuse(EPERM)},
            {SYS_setgroups, refuse(EPERM)},
            {SYS_setresuid, refuse(EPERM)},
            {SYS_setresgid, refuse(EPERM)},
        },
        kAllow,
        kAllow,
        kFirstAlien,
        0,  // the worker's filter has checked the architecture
    };
}

}  // namespace rlef
