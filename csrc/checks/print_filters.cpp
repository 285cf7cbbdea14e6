// Prints the filters of every architecture, instruction by instruction. What a build for another
// machine prints must be what a build for this one prints: `make aarch64`.

#include <cstdio>

#include "../policy.hpp"

namespace {

constexpr pid_t kAnyPid = 4711;

void print(const rlef::Policy& policy) {
    for (const auto& step : rlef::compile(policy))
        std::printf("%u %u %u %u\n", step.code, step.jt, step.jf, step.k);
}

}  // namespace

int main() {
    for (const auto architecture : {rlef::Architecture::X86_64, rlef::Architecture::Aarch64}) {
        print(rlef::worker_policy(architecture));
        for (const bool may_fork : {false, true}) {
            print(rlef::test_policy(kAnyPid, architecture, may_fork));
            for (const bool may_write : {false, true}) {
                print(rlef::command_policy({may_fork, may_write}, architecture));
            }
        }
    }
}
