// A make-believe libnvrtc: what it compiles a kernel to is a shared library for this machine, which driver.cpp loads.
//
// Libraries are kept in the folder TREESPARK_EMULATION_DIR by a hash of what they were made from, if it is set.
// The folder of the headers is compiled in as EMU_HEADERS, and machine.cpp's product as EMU_MACHINE, whose path names
// the headers' hash.
// A mistake is planted into the kernels where TREESPARK_EMULATION_REPLACE is set: TREESPARK_EMULATION_BY takes its place.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <vector>

#define NVRTC extern "C" __attribute__((visibility("default"))) int

namespace {

enum Result { SUCCESS = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, COMPILATION = 6, INTERNAL = 11 };

struct Program {
    std::string source, log, library;
};

bool is_word(char c) { return isalnum((unsigned char)c) || c == '_'; }

// The source with the mistake that the environment asks for.
std::string planted(std::string source) {
    const char* text = getenv("TREESPARK_EMULATION_REPLACE");
    const char* by = getenv("TREESPARK_EMULATION_BY");
    if (!text || !*text || !by) return source;
    for (size_t at = 0; (at = source.find(text, at)) != std::string::npos; at += strlen(by)) {
        source.replace(at, strlen(text), by);
    }
    return source;
}

// Behind the parenthesis that closes the one at `open`.
size_t behind(const std::string& source, size_t open) {
    size_t at = open, depth = 0;
    do {
        depth += source[at] == '(';
        depth -= source[at] == ')';
        at++;
    } while (depth && at < source.size());
    return at;
}

// Names of the functions declared `extern "C" __global__`: of each, the word before the first parenthesis that is not
// an attribute's.
std::vector<std::string> kernels(const std::string& source) {
    std::vector<std::string> names;
    const std::string mark = "extern \"C\" __global__";
    for (size_t at = source.find(mark); at != std::string::npos; at = source.find(mark, at)) {
        at += mark.size();
        for (;;) {
            const size_t open = source.find('(', at);
            if (open == std::string::npos) return names;
            size_t end = open;
            while (isspace((unsigned char)source[end - 1])) end--;
            size_t begin = end;
            while (is_word(source[begin - 1])) begin--;
            const std::string name = source.substr(begin, end - begin);
            at = behind(source, open);
            if (name == "__launch_bounds__" || name == "__cluster_dims__") continue;
            names.push_back(name);
            break;
        }
    }
    return names;
}

// The source, and for each of its kernels what driver.cpp looks for.
std::string translation(const Program& program) {
    std::string text = "#include \"cuda_on_cpu.h\"\nnamespace {\n#line 1 \"kernel.cu\"\n" + program.source + "\n}\n";
    const std::string exported = "extern \"C\" __attribute__((visibility(\"default\"))) ";
    for (const std::string& name : kernels(program.source)) {
        text += exported + "void emu_run_" + name + "(emu::Launch launch) {\n" +
                "    launch.body = [](void** arguments) { emu::call(" + name + ", arguments); };\n" +
                "    emu::run(launch);\n}\n";
        text += exported + "unsigned emu_sizes_" + name + "(size_t* sizes) { return emu::argument_sizes(" + name +
                ", sizes); }\n";
    }
    return text;
}

// FNV-1a.
uint64_t hash(const std::string& text, uint64_t from = 0xcbf29ce484222325ull) {
    for (unsigned char c : text) from = (from ^ c) * 0x100000001b3ull;
    return from;
}

bool read_file(const std::string& path, std::string* content) {
    FILE* file = fopen(path.c_str(), "rb");
    if (!file) return false;
    content->clear();
    char buffer[1 << 16];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, file)) > 0;) content->append(buffer, n);
    fclose(file);
    return true;
}

bool write_file(const std::string& path, const std::string& content) {
    FILE* file = fopen(path.c_str(), "wb");
    if (!file) return false;
    const bool whole = fwrite(content.data(), 1, content.size(), file) == content.size();
    return (fclose(file) == 0) && whole;
}

// Products and sums are rounded apart unless the source says fmaf, so that results do not depend on the compiler. Most
// kernels run for less time than they compile: little optimisation, and nothing of C++'s library, which takes longer to
// read and to link than the kernel.
std::string compiler(int arch) {
    std::string command = "gcc -shared -fPIC -O1 -std=c++17 -w -fvisibility=hidden -ffp-contract=off -DCUDA_ON_CPU";
    command += " -nostdinc++ -fno-exceptions";
    command += " -D__CUDA_ARCH__=" + std::to_string(10 * arch);
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) command += " -mavx2";
    if (__builtin_cpu_supports("fma")) command += " -mfma -mf16c";
#endif
    return command + " -I'" EMU_HEADERS "'";
}

// Compute capability times ten, from the option that names it.
int arch_of(int n_options, const char* const* options) {
    for (int i = 0; i < n_options; i++) {
        const char* value = strstr(options[i], "=sm_");
        if (value && strncmp(options[i], "--gpu-architecture", 18) == 0) return atoi(value + 4);
    }
    return 90;
}

std::string temporary_folder() {
    const char* folder = getenv("TMPDIR");
    std::string path = std::string(folder ? folder : "/tmp") + "/treespark-nvrtc-XXXXXX";
    return mkdtemp(&path[0]) ? path : std::string();
}

// Runs a command, its output added to the log.
bool run(const std::string& command, std::string* log) {
    FILE* output = popen((command + " 2>&1").c_str(), "r");
    if (!output) return false;
    char buffer[1 << 12];
    for (size_t n; (n = fread(buffer, 1, sizeof buffer, output)) > 0;) log->append(buffer, n);
    return pclose(output) == 0;
}

int compile(Program& program, std::string command) {
    const std::string text = translation(program);
    std::string kept;
    if (const char* folder = getenv("TREESPARK_EMULATION_DIR")) {
        char name[64];
        const uint64_t of = hash(text, hash(EMU_MACHINE, hash(command)));
        snprintf(name, sizeof name, "/kernel-%016llx.so", (unsigned long long)of);
        mkdir(folder, 0777);
        kept = std::string(folder) + name;
        if (read_file(kept, &program.library)) return SUCCESS;
    }

    const std::string folder = temporary_folder();
    const std::string source = folder + "/kernel.cpp", library = folder + "/kernel.so";
    if (folder.empty() || !write_file(source, text)) {
        program.log = "cannot write a temporary file";
        return INTERNAL;
    }
    command += " -x c++ '" + source + "' -x none '" EMU_MACHINE "' -lm -o '" + library + "'";
    const bool compiled = run(command, &program.log);
    const bool read = compiled && read_file(library, &program.library);
    // Others may make the same library at the same time: it appears whole, or not at all.
    if (read && !kept.empty()) {
        const std::string mine = kept + "." + folder.substr(folder.size() - 6);
        if (write_file(mine, program.library)) rename(mine.c_str(), kept.c_str());
    }
    unlink(source.c_str());
    unlink(library.c_str());
    rmdir(folder.c_str());
    return read ? SUCCESS : COMPILATION;
}

} // namespace

NVRTC nvrtcVersion(int* major, int* minor) {
    *major = 13;
    *minor = 0;
    return SUCCESS;
}

NVRTC nvrtcGetNumSupportedArchs(int* n) {
    *n = 2;
    return SUCCESS;
}

NVRTC nvrtcGetSupportedArchs(int* archs) {
    archs[0] = 80;
    archs[1] = 90;
    return SUCCESS;
}

extern "C" __attribute__((visibility("default"))) const char* nvrtcGetErrorString(int result) {
    switch (result) {
        case SUCCESS: return "NVRTC_SUCCESS";
        case COMPILATION: return "NVRTC_ERROR_COMPILATION";
        default: return "an error of the make-believe nvrtc";
    }
}

NVRTC nvrtcCreateProgram(Program** program, const char* source, const char*, int n_headers, const char* const*,
                         const char* const*) {
    if (n_headers) return INVALID_INPUT;
    *program = new Program();
    (*program)->source = planted(source);
    return SUCCESS;
}

NVRTC nvrtcDestroyProgram(Program** program) {
    delete *program;
    *program = nullptr;
    return SUCCESS;
}

NVRTC nvrtcCompileProgram(Program* program, int n_options, const char* const* options) {
    return compile(*program, compiler(arch_of(n_options, options)));
}

NVRTC nvrtcGetProgramLogSize(Program* program, size_t* bytes) {
    *bytes = program->log.size() + 1;
    return SUCCESS;
}

NVRTC nvrtcGetProgramLog(Program* program, char* log) {
    memcpy(log, program->log.c_str(), program->log.size() + 1);
    return SUCCESS;
}

NVRTC nvrtcGetCUBINSize(Program* program, size_t* bytes) {
    *bytes = program->library.size();
    return program->library.empty() ? INVALID_PROGRAM : SUCCESS;
}

NVRTC nvrtcGetCUBIN(Program* program, char* cubin) {
    memcpy(cubin, program->library.data(), program->library.size());
    return SUCCESS;
}
