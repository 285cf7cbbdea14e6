#include "command.hpp"

#include <errno.h>
#include <string.h>

#include <system_error>

namespace rlef {
namespace {

class Writer {
  public:
    void number(std::uint64_t value) { bytes_.append(reinterpret_cast<const char*>(&value), sizeof value); }
    void text(std::string_view value) {
        number(value.size());
        bytes_.append(value);
    }
    void texts(const std::vector<std::string>& values) {
        number(values.size());
        for (const auto& value : values) text(value);
    }
    template <typename Files>
    void files(const Files& values) {
        number(values.size());
        for (const auto& file : values) {
            text(file.name);
            text(file.content);
        }
    }
    std::string take() { return std::move(bytes_); }

  private:
    std::string bytes_;
};

class Reader {
  public:
    explicit Reader(std::string_view bytes) : bytes_(bytes) {}

    std::uint64_t number() {
        std::uint64_t value;
        const auto part = take(sizeof value);
        ::memcpy(&value, part.data(), sizeof value);
        return value;
    }
    std::string_view part() { return take(number()); }
    std::string text() { return std::string(part()); }
    std::vector<std::string> texts() {
        std::vector<std::string> values;
        for (auto count = number(); count > 0; --count) values.push_back(text());
        return values;
    }
    template <typename Any>
    std::vector<Any> files() {
        std::vector<Any> values;
        for (auto count = number(); count > 0; --count) {
            auto name = text();
            const auto content = part();
            values.push_back({std::move(name), decltype(Any::content)(content)});
        }
        return values;
    }

  private:
    std::string_view take(std::uint64_t size) {
        if (size > bytes_.size()) {
            throw std::system_error(EBADMSG, std::generic_category(), "decode a command");
        }
        const auto part = bytes_.substr(0, size);
        bytes_.remove_prefix(size);
        return part;
    }

    std::string_view bytes_;
};

}  // namespace

std::string encode(const Command& command) {
    Writer writer;
    writer.texts(command.arguments);
    writer.texts(command.environment);
    writer.files(command.files);
    writer.texts(command.outputs);
    writer.number(command.may_fork ? 1 : 0);
    writer.number(static_cast<std::uint64_t>(command.stack_bytes));
    return writer.take();
}

std::string encode(const std::vector<File>& files) {
    Writer writer;
    writer.files(files);
    return writer.take();
}

Command decode_command(std::string_view bytes) {
    Reader reader(bytes);
    Command command;
    command.arguments = reader.texts();
    command.environment = reader.texts();
    command.files = reader.files<GivenFile>();
    command.outputs = reader.texts();
    command.may_fork = reader.number() != 0;
    command.stack_bytes = static_cast<std::int64_t>(reader.number());
    return command;
}

std::vector<File> decode_files(std::string_view bytes) {
    return Reader(bytes).files<File>();
}

std::vector<char*> pointers(const std::vector<std::string>& strings) {
    std::vector<char*> result;
    for (const auto& string : strings) result.push_back(const_cast<char*>(string.c_str()));
    result.push_back(nullptr);
    return result;
}

}  // namespace rlef
