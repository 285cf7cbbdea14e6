// Hostile and faulty commands, one for each name that main() knows. What is printed after "REACHED" would be a
// hole; a refusal prints the kernel's word for it. Compiled, and run, by test_command_attacks.py.

#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

namespace {

/// Prints what came of a call that should fail.
void attempt(long result) {
    std::puts(result < 0 ? strerrorname_np(errno) : "REACHED");
    std::fflush(stdout);
}

void fill(const char* name, long bytes) {
    const int file = open(name, O_WRONLY | O_CREAT, 0644);
    if (file < 0) return attempt(-1);
    const std::vector<char> block(1 << 16, 'x');
    while (bytes > 0) {
        const long size = write(file, block.data(), block.size());
        if (size < 0) return attempt(-1);
        bytes -= size;
    }
    std::puts("REACHED");
}

void hold(long bytes) {
    std::vector<char*> held;
    for (; bytes > 0; bytes -= 1 << 20) {
        auto* const block = static_cast<char*>(malloc(1 << 20));
        if (!block) abort();
        held.push_back(static_cast<char*>(memset(block, 1, 1 << 20)));
    }
    std::puts("held");
}

[[noreturn]] void burn() {
    for (volatile long i = 0;; i = i + 1) {
    }
}

int deep(int depth) {
    volatile char frame[1 << 10];
    frame[0] = static_cast<char>(depth);
    return depth == 0 ? 0 : deep(depth - 1) + frame[0] - frame[0];
}

/// A copy of this process that lives until it is killed, in a session of its own if it can have one.
void leave_behind(bool in_new_session) {
    if (fork() != 0) return;
    if (in_new_session) setsid();
    for (const int number : {SIGTERM, SIGHUP, SIGINT}) signal(number, SIG_IGN);
    if (fork() != 0) _exit(0);
    while (true) pause();
}

void fork_bomb() {
    for (int i = 0; i < 100'000; ++i) {
        const pid_t child = fork();
        if (child < 0) break;
        if (child == 0 && i > 10) pause();
    }
    pause();
}

std::string capabilities() {
    __user_cap_header_struct header{_LINUX_CAPABILITY_VERSION_3, 0};
    __user_cap_data_struct data[2] = {};
    syscall(SYS_capget, &header, data);
    for (const auto& word : data) {
        if (word.effective | word.permitted | word.inheritable) return "REACHED";
    }
    return "none";
}

std::string open_descriptors() {
    std::string found;
    for (int file = 0; file < 1024; ++file) {
        if (fcntl(file, F_GETFD) >= 0) found += std::to_string(file) + " ";
    }
    return found;
}

long raise_limit(int resource) {
    const rlimit all{RLIM_INFINITY, RLIM_INFINITY};
    return setrlimit(static_cast<__rlimit_resource>(resource), &all);
}

const std::map<std::string, std::function<void()>> kAttacks = {
    // starting
    {"fork", [] { attempt(fork()); }},
    {"vfork", [] { attempt(syscall(SYS_vfork)); }},
    {"clone_process", [] { attempt(syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)); }},
    {"clone3", [] { attempt(syscall(SYS_clone3, nullptr, 0)); }},
    {"fork_bomb", fork_bomb},
    {"daemon", [] { leave_behind(true); }},
    {"background", [] { leave_behind(false); }},
    {"new_session", [] { attempt(setsid()); }},
    {"new_group", [] { attempt(setpgid(0, 0)); }},
    {"threads",
     [] {
         std::vector<std::thread> threads;
         try {
             while (threads.size() < 1000) threads.emplace_back([] { pause(); });
             std::puts("REACHED");
         } catch (const std::system_error& error) {
             std::puts(strerrorname_np(error.code().value()));
         }
         std::fflush(stdout);
         _exit(0);
     }},
    {"execute_a_set_uid_program", [] { attempt(execl("/usr/bin/passwd", "passwd", "-S", nullptr)); }},
    // signals and other processes
    {"kill_everybody", [] { attempt(kill(-1, SIGKILL)); }},
    {"kill_the_first", [] { attempt(kill(1, SIGKILL)); }},
    {"kill_the_parent", [] { attempt(kill(getppid(), SIGKILL)); }},
    {"kill_the_group", [] { attempt(kill(0, SIGKILL)); }},
    {"trace", [] { attempt(ptrace(PTRACE_ATTACH, getppid(), 0, 0)); }},
    {"stop_itself", [] { raise(SIGSTOP); }},
    {"abort", [] { abort(); }},
    {"leave_the_parent", [] { attempt(prctl(PR_SET_PDEATHSIG, 0)); }},
    {"become_a_reaper", [] { attempt(prctl(PR_SET_CHILD_SUBREAPER, 1)); }},
    // rights
    {"capabilities", [] { std::puts(capabilities().c_str()); }},
    {"become_root", [] { attempt(setresuid(0, 0, 0)); }},
    {"raise_cpu", [] { attempt(raise_limit(RLIMIT_CPU)); }},
    {"raise_data", [] { attempt(raise_limit(RLIMIT_DATA)); }},
    {"raise_file_size", [] { attempt(raise_limit(RLIMIT_FSIZE)); }},
    {"raise_processes", [] { attempt(raise_limit(RLIMIT_NPROC)); }},
    {"raise_priority", [] { attempt(setpriority(PRIO_PROCESS, 0, -20)); }},
    // kernel
    {"mount", [] { attempt(mount("none", "/box", "tmpfs", 0, nullptr)); }},
    {"unmount", [] { attempt(umount2("/box", MNT_DETACH)); }},
    {"new_user_namespace", [] { attempt(unshare(CLONE_NEWUSER)); }},
    {"new_namespace_by_clone", [] { attempt(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)); }},
    {"change_root", [] { attempt(chroot("/box")); }},
    {"io_uring", [] { attempt(syscall(SYS_io_uring_setup, 8, nullptr)); }},
    {"bpf", [] { attempt(syscall(SYS_bpf, 0, nullptr, 0)); }},
    {"userfaultfd", [] { attempt(syscall(SYS_userfaultfd, 0)); }},
    {"keys", [] { attempt(syscall(SYS_keyctl, 0, 0)); }},
    {"performance", [] { attempt(syscall(SYS_perf_event_open, nullptr, 0, -1, -1, 0)); }},
    {"loosen_the_filter", [] { attempt(syscall(SYS_seccomp, 1, 0, nullptr)); }},
    {"change_personality", [] { attempt(syscall(SYS_personality, 0x0400000)); }},
    // network and sharing
    {"internet", [] { attempt(socket(AF_INET, SOCK_STREAM, 0)); }},
    {"local_socket", [] { attempt(socket(AF_UNIX, SOCK_STREAM, 0)); }},
    {"netlink", [] { attempt(socket(AF_NETLINK, SOCK_RAW, 0)); }},
    {"vsock", [] { attempt(socket(AF_VSOCK, SOCK_STREAM, 0)); }},
    {"system_v_memory", [] { attempt(syscall(SYS_shmget, 0, 4096, 01600)); }},
    {"shared_memory", [] { attempt(mmap(nullptr, 1 << 20, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0); }},
    {"memory_file", [] { attempt(syscall(SYS_memfd_create, "x", 0)); }},
    // files
    {"read_passwords", [] { attempt(open("/etc/passwd", O_RDONLY)); }},
    {"read_processes", [] { attempt(open("/proc/self/status", O_RDONLY)); }},
    {"list_the_root", [] { attempt(open("/", O_RDONLY | O_DIRECTORY)); }},
    {"climb_out", [] { attempt(open("../../../../etc/passwd", O_RDONLY)); }},
    {"write_here", [] { attempt(open("new", O_WRONLY | O_CREAT, 0644)); }},
    {"make_a_folder", [] { attempt(mkdir("folder", 0755)); }},
    {"change_itself", [] { attempt(open("attacks", O_WRONLY)); }},
    {"remove_itself", [] { attempt(unlink("attacks")); }},
    {"write_to_the_root", [] { attempt(open("/reached", O_WRONLY | O_CREAT, 0644)); }},
    {"write_to_a_library", [] { attempt(open("/usr/reached", O_WRONLY | O_CREAT, 0644)); }},
    {"rename_out", [] { attempt(rename("attacks", "/usr/reached")); }},
    {"link_out", [] { attempt(link("/usr/bin/env", "reached")); }},
    {"make_a_device", [] { attempt(mknod("device", S_IFCHR | 0666, (1 << 8) | 1)); }},
    {"make_set_uid", [] { attempt(chmod("attacks", 06755)); }},
    {"write_a_device", [] { attempt(open("/dev/null", O_WRONLY)); }},
    {"fill_the_folder", [] { fill("large", 64 << 20); }},
    {"many_files",
     [] {
         for (int i = 0; i < 100'000; ++i) {
             if (open(("f" + std::to_string(i)).c_str(), O_WRONLY | O_CREAT, 0644) < 0) return attempt(-1);
             close(3);
         }
         std::puts("REACHED");
     }},
    {"descriptors", [] { std::puts(open_descriptors().c_str()); }},
    {"many_descriptors",
     [] {
         while (dup(0) >= 0) {
         }
         attempt(-1);
     }},
    {"environment",
     [] {
         for (char** line = environ; *line; ++line) std::puts(*line);
     }},
    // using up
    {"burn", [] { burn(); }},
    {"burn_in_a_child", [] { fork() == 0 ? burn() : (void)pause(); }},
    {"burn_in_children_that_end",
     [] {
         for (int i = 0; i < 4; ++i) {
             if (fork() == 0) {
                 while (clock() < CLOCKS_PER_SEC / 8) {
                 }
                 _exit(0);
             }
         }
         while (wait(nullptr) > 0) {
         }
     }},
    {"burn_and_ignore_the_signal", [] { signal(SIGXCPU, SIG_IGN), burn(); }},
    {"idle", [] { pause(); }},
    {"hold_much", [] { hold(512 << 20); }},
    {"hold_little", [] { hold(64 << 20); }},
    {"reserve_much",
     [] {
         // What run-time systems do: reserve, and use a little.
         auto* const pages = mmap(nullptr, 1L << 40, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
         std::puts(pages == MAP_FAILED ? strerrorname_np(errno) : "reserved");
     }},
    {"overflow_the_stack", [] { std::printf("%d\n", deep(1 << 30)); }},
    {"recurse_deeply", [] { std::printf("%d\n", deep(50'000)); }},
    {"print_much",
     [] {
         const std::string line(1023, 'x');
         while (true) std::puts(line.c_str());
     }},
    {"print_much_as_error",
     [] {
         const std::string line(1023, 'x');
         while (true) std::fprintf(stderr, "%s\n", line.c_str());
     }},
    {"close_the_streams",
     [] {
         for (const int stream : {0, 1, 2}) close(stream);
     }},
    {"exit_250", [] { _exit(250); }},
    {"print_a_verdict", [] { std::puts("passed"), std::exit(3); }},
};

}  // namespace

int main(int count, char** arguments) {
    const auto found = count > 1 ? kAttacks.find(arguments[1]) : kAttacks.end();
    if (found == kAttacks.end()) {
        for (const auto& [name, body] : kAttacks) std::puts(name.c_str());
        return 2;
    }
    found->second();
}
