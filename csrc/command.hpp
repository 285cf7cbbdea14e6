#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace rlef {

/// A file that a command left in its working folder.
struct File {
    std::string name;
    std::string content;
};

/// A file that a command finds there.
struct GivenFile {
    std::string name;          // relative to the folder; may name folders, which are made
    std::string_view content;  // belongs to whoever made the command
};

/// A program that is no source for the warm interpreter: what to execute, and what lies beside it.
struct Command {
    std::vector<std::string> arguments;    // the first names the executable
    std::vector<std::string> environment;  // "NAME=value"
    std::vector<GivenFile> files;
    std::vector<std::string> outputs;  // names of files to bring back
    bool may_fork = false;             // it may start processes
    std::int64_t stack_bytes = 0;      // of its main thread
};

/// A checker's own files: the arguments that its command gets, in testlib's order.
constexpr std::array<const char*, 3> kCheckerArguments = {"input.txt", "output.txt", "answer.txt"};

/// As bytes, for the way between supervisor and worker.
std::string encode(const Command& command);
std::string encode(const std::vector<File>& files);

/// The way back. Throw std::system_error (EBADMSG) for bytes that no `encode` wrote. The command's files are
/// parts of `bytes`.
Command decode_command(std::string_view bytes);
std::vector<File> decode_files(std::string_view bytes);

/// What execve takes: pointers into the strings, and a null pointer behind them.
std::vector<char*> pointers(const std::vector<std::string>& strings);

}  // namespace rlef
