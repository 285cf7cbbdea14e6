#pragma once

#include <cstdint>

namespace rlef {

/// A processor whose system calls we have a policy for.
enum class Architecture : std::uint8_t { X86_64, Aarch64 };

#ifdef __x86_64__
constexpr Architecture kOwnArchitecture = Architecture::X86_64;
#elif defined(__aarch64__)
constexpr Architecture kOwnArchitecture = Architecture::Aarch64;
#else
#error "rlef_sandbox has a system call policy for x86-64 and aarch64 only"
#endif

constexpr std::uint32_t kAbsent = UINT32_MAX;

/// A system call's number on each architecture; kAbsent where it has none.
struct SystemCall {
    std::uint32_t x86_64;
    std::uint32_t aarch64;

    constexpr std::uint32_t on(Architecture architecture) const {
        return architecture == Architecture::X86_64 ? x86_64 : aarch64;
    }
};

/// Numbers of our own, not the headers': so every architecture's policy can be made, and tested, on any
/// machine. tests/sandbox/test_filter.py compares them with the kernel's headers.
namespace call {

constexpr SystemCall accept{43, 202};
constexpr SystemCall accept4{288, 242};
constexpr SystemCall access{21, kAbsent};
constexpr SystemCall acct{163, 89};
constexpr SystemCall add_key{248, 217};
constexpr SystemCall adjtimex{159, 171};
constexpr SystemCall alarm{37, kAbsent};
constexpr SystemCall arch_prctl{158, kAbsent};
constexpr SystemCall bind{49, 200};
constexpr SystemCall bpf{321, 280};
constexpr SystemCall brk{12, 214};
constexpr SystemCall capget{125, 90};
constexpr SystemCall capset{126, 91};
constexpr SystemCall chdir{80, 49};
constexpr SystemCall chmod{90, kAbsent};
constexpr SystemCall chroot{161, 51};
constexpr SystemCall clock_adjtime{305, 266};
constexpr SystemCall clock_getres{229, 114};
constexpr SystemCall clock_gettime{228, 113};
constexpr SystemCall clock_nanosleep{230, 115};
constexpr SystemCall clock_settime{227, 112};
constexpr SystemCall clone{56, 220};
constexpr SystemCall clone3{435, 435};
constexpr SystemCall close{3, 57};
constexpr SystemCall close_range{436, 436};
constexpr SystemCall connect{42, 203};
constexpr SystemCall copy_file_range{326, 285};
constexpr SystemCall creat{85, kAbsent};
constexpr SystemCall delete_module{176, 106};
constexpr SystemCall dup{32, 23};
constexpr SystemCall dup2{33, kAbsent};
constexpr SystemCall dup3{292, 24};
constexpr SystemCall epoll_create{213, kAbsent};
constexpr SystemCall epoll_create1{291, 20};
constexpr SystemCall epoll_ctl{233, 21};
constexpr SystemCall epoll_pwait{281, 22};
constexpr SystemCall epoll_wait{232, kAbsent};
constexpr SystemCall eventfd{284, kAbsent};
constexpr SystemCall eventfd2{290, 19};
constexpr SystemCall execve{59, 221};
constexpr SystemCall execveat{322, 281};
constexpr SystemCall exit{60, 93};
constexpr SystemCall exit_group{231, 94};
constexpr SystemCall faccessat{269, 48};
constexpr SystemCall faccessat2{439, 439};
constexpr SystemCall fadvise64{221, 223};
constexpr SystemCall fallocate{285, 47};
constexpr SystemCall fchdir{81, 50};
constexpr SystemCall fchmod{91, 52};
constexpr SystemCall fchmodat{268, 53};
constexpr SystemCall fchmodat2{452, 452};
constexpr SystemCall fcntl{72, 25};
constexpr SystemCall fdatasync{75, 83};
constexpr SystemCall fgetxattr{193, 10};
constexpr SystemCall finit_module{313, 273};
constexpr SystemCall flistxattr{196, 13};
constexpr SystemCall flock{73, 32};
constexpr SystemCall fork{57, kAbsent};
constexpr SystemCall fsmount{432, 432};
constexpr SystemCall fsopen{430, 430};
constexpr SystemCall fstat{5, 80};
constexpr SystemCall fstatfs{138, 44};
constexpr SystemCall fsync{74, 82};
constexpr SystemCall ftruncate{77, 46};
constexpr SystemCall futex{202, 98};
constexpr SystemCall futimesat{261, kAbsent};
constexpr SystemCall get_robust_list{274, 100};
constexpr SystemCall getcpu{309, 168};
constexpr SystemCall getcwd{79, 17};
constexpr SystemCall getdents{78, kAbsent};
constexpr SystemCall getdents64{217, 61};
constexpr SystemCall getegid{108, 177};
constexpr SystemCall geteuid{107, 175};
constexpr SystemCall getgid{104, 176};
constexpr SystemCall getgroups{115, 158};
constexpr SystemCall getitimer{36, 102};
constexpr SystemCall getpgid{121, 155};
constexpr SystemCall getpgrp{111, kAbsent};
constexpr SystemCall getpid{39, 172};
constexpr SystemCall getppid{110, 173};
constexpr SystemCall getpriority{140, 141};
constexpr SystemCall getrandom{318, 278};
constexpr SystemCall getresgid{120, 150};
constexpr SystemCall getresuid{118, 148};
constexpr SystemCall getrlimit{97, 163};
constexpr SystemCall getrusage{98, 165};
constexpr SystemCall getsid{124, 156};
constexpr SystemCall getsockname{51, 204};
constexpr SystemCall getsockopt{55, 209};
constexpr SystemCall gettid{186, 178};
constexpr SystemCall gettimeofday{96, 169};
constexpr SystemCall getuid{102, 174};
constexpr SystemCall getxattr{191, 8};
constexpr SystemCall init_module{175, 105};
constexpr SystemCall io_setup{206, 0};
constexpr SystemCall io_uring_enter{426, 426};
constexpr SystemCall io_uring_register{427, 427};
constexpr SystemCall io_uring_setup{425, 425};
constexpr SystemCall ioctl{16, 29};
constexpr SystemCall ioperm{173, kAbsent};
constexpr SystemCall iopl{172, kAbsent};
constexpr SystemCall kcmp{312, 272};
constexpr SystemCall kexec_file_load{320, 294};
constexpr SystemCall kexec_load{246, 104};
constexpr SystemCall keyctl{250, 219};
constexpr SystemCall kill{62, 129};
constexpr SystemCall lgetxattr{192, 9};
constexpr SystemCall link{86, kAbsent};
constexpr SystemCall linkat{265, 37};
constexpr SystemCall listen{50, 201};
constexpr SystemCall listxattr{194, 11};
constexpr SystemCall llistxattr{195, 12};
constexpr SystemCall lseek{8, 62};
constexpr SystemCall lstat{6, kAbsent};
constexpr SystemCall madvise{28, 233};
constexpr SystemCall membarrier{324, 283};
constexpr SystemCall mincore{27, 232};
constexpr SystemCall mkdir{83, kAbsent};
constexpr SystemCall mkdirat{258, 34};
constexpr SystemCall mmap{9, 222};
constexpr SystemCall modify_ldt{154, kAbsent};
constexpr SystemCall mount{165, 40};
constexpr SystemCall mount_setattr{442, 442};
constexpr SystemCall move_mount{429, 429};
constexpr SystemCall mprotect{10, 226};
constexpr SystemCall mremap{25, 216};
constexpr SystemCall msync{26, 227};
constexpr SystemCall munmap{11, 215};
constexpr SystemCall name_to_handle_at{303, 264};
constexpr SystemCall nanosleep{35, 101};
constexpr SystemCall newfstatat{262, 79};
constexpr SystemCall open{2, kAbsent};
constexpr SystemCall open_by_handle_at{304, 265};
constexpr SystemCall open_tree{428, 428};
constexpr SystemCall openat{257, 56};
constexpr SystemCall pause{34, kAbsent};
constexpr SystemCall perf_event_open{298, 241};
constexpr SystemCall personality{135, 92};
constexpr SystemCall pidfd_getfd{438, 438};
constexpr SystemCall pidfd_open{434, 434};
constexpr SystemCall pidfd_send_signal{424, 424};
constexpr SystemCall pipe{22, kAbsent};
constexpr SystemCall pipe2{293, 59};
constexpr SystemCall pivot_root{155, 41};
constexpr SystemCall poll{7, kAbsent};
constexpr SystemCall ppoll{271, 73};
constexpr SystemCall prctl{157, 167};
constexpr SystemCall pread64{17, 67};
constexpr SystemCall preadv{295, 69};
constexpr SystemCall preadv2{327, 286};
constexpr SystemCall prlimit64{302, 261};
constexpr SystemCall process_vm_readv{310, 270};
constexpr SystemCall process_vm_writev{311, 271};
constexpr SystemCall pselect6{270, 72};
constexpr SystemCall ptrace{101, 117};
constexpr SystemCall pwrite64{18, 68};
constexpr SystemCall pwritev{296, 70};
constexpr SystemCall pwritev2{328, 287};
constexpr SystemCall quotactl{179, 60};
constexpr SystemCall read{0, 63};
constexpr SystemCall readlink{89, kAbsent};
constexpr SystemCall readlinkat{267, 78};
constexpr SystemCall readv{19, 65};
constexpr SystemCall reboot{169, 142};
constexpr SystemCall recvfrom{45, 207};
constexpr SystemCall recvmsg{47, 212};
constexpr SystemCall rename{82, kAbsent};
constexpr SystemCall renameat{264, 38};
constexpr SystemCall renameat2{316, 276};
constexpr SystemCall request_key{249, 218};
constexpr SystemCall restart_syscall{219, 128};
constexpr SystemCall rmdir{84, kAbsent};
constexpr SystemCall rseq{334, 293};
constexpr SystemCall rt_sigaction{13, 134};
constexpr SystemCall rt_sigpending{127, 136};
constexpr SystemCall rt_sigprocmask{14, 135};
constexpr SystemCall rt_sigreturn{15, 139};
constexpr SystemCall rt_sigsuspend{130, 133};
constexpr SystemCall rt_sigtimedwait{128, 137};
constexpr SystemCall sched_get_priority_max{146, 125};
constexpr SystemCall sched_get_priority_min{147, 126};
constexpr SystemCall sched_getaffinity{204, 123};
constexpr SystemCall sched_getparam{143, 121};
constexpr SystemCall sched_getscheduler{145, 120};
constexpr SystemCall sched_yield{24, 124};
constexpr SystemCall seccomp{317, 277};
constexpr SystemCall select{23, kAbsent};
constexpr SystemCall sendfile{40, 71};
constexpr SystemCall sendmsg{46, 211};
constexpr SystemCall sendto{44, 206};
constexpr SystemCall set_robust_list{273, 99};
constexpr SystemCall set_tid_address{218, 96};
constexpr SystemCall setdomainname{171, 162};
constexpr SystemCall setgroups{116, 159};
constexpr SystemCall sethostname{170, 161};
constexpr SystemCall setitimer{38, 103};
constexpr SystemCall setns{308, 268};
constexpr SystemCall setresgid{119, 149};
constexpr SystemCall setresuid{117, 147};
constexpr SystemCall setrlimit{160, 164};
constexpr SystemCall settimeofday{164, 170};
constexpr SystemCall shutdown{48, 210};
constexpr SystemCall sigaltstack{131, 132};
constexpr SystemCall socket{41, 198};
constexpr SystemCall socketpair{53, 199};
constexpr SystemCall stat{4, kAbsent};
constexpr SystemCall statfs{137, 43};
constexpr SystemCall statx{332, 291};
constexpr SystemCall swapoff{168, 225};
constexpr SystemCall swapon{167, 224};
constexpr SystemCall symlink{88, kAbsent};
constexpr SystemCall symlinkat{266, 36};
constexpr SystemCall sync_file_range{277, 84};
constexpr SystemCall sysinfo{99, 179};
constexpr SystemCall syslog{103, 116};
constexpr SystemCall tgkill{234, 131};
constexpr SystemCall time{201, kAbsent};
constexpr SystemCall times{100, 153};
constexpr SystemCall tkill{200, 130};
constexpr SystemCall truncate{76, 45};
constexpr SystemCall umask{95, 166};
constexpr SystemCall umount2{166, 39};
constexpr SystemCall uname{63, 160};
constexpr SystemCall unlink{87, kAbsent};
constexpr SystemCall unlinkat{263, 35};
constexpr SystemCall unshare{272, 97};
constexpr SystemCall userfaultfd{323, 282};
constexpr SystemCall utime{132, kAbsent};
constexpr SystemCall utimensat{280, 88};
constexpr SystemCall utimes{235, kAbsent};
constexpr SystemCall vfork{58, kAbsent};
constexpr SystemCall vhangup{153, 58};
constexpr SystemCall wait4{61, 260};
constexpr SystemCall waitid{247, 95};
constexpr SystemCall write{1, 64};
constexpr SystemCall writev{20, 66};

}  // namespace call
}  // namespace rlef
