#include "reader.h"

#include <algorithm>
#include <cerrno>
#include <cstring>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

namespace tt {
namespace {

constexpr int STOP_MILLISECONDS = 50; // between two looks whether somebody wants an end

std::string reason(int64_t error) {
    return std::strerror(static_cast<int>(error));
}

#if defined(__linux__) && defined(O_DIRECT)
// The granularity of direct reads, in the file and in memory; 0 where there are none such as we make. Asked
// of the kernel through its raw interface, because older C libraries do not declare the two fields.
uint64_t direct_sector(int descriptor) {
#if defined(SYS_statx)
    constexpr unsigned DIO_ALIGNMENT = 0x2000; // STATX_DIOALIGN
    constexpr int EMPTY_PATH = 0x1000;         // AT_EMPTY_PATH
    struct {
        uint32_t mask;
        uint32_t before[37];
        uint32_t memory_alignment; // at 0x98
        uint32_t offset_alignment;
        uint32_t after[24];
    } answer{};
    static_assert(offsetof(decltype(answer), memory_alignment) == 0x98, "as in linux/stat.h");
    static_assert(sizeof(answer) == 256, "as in linux/stat.h");
    if (syscall(SYS_statx, descriptor, "", EMPTY_PATH, DIO_ALIGNMENT, &answer) == 0 &&
        (answer.mask & DIO_ALIGNMENT)) {
        const uint64_t sector = std::max(answer.offset_alignment, answer.memory_alignment);
        const bool power_of_two = (sector & (sector - 1)) == 0;
        return answer.offset_alignment != 0 && power_of_two && sector <= Reader::SECTOR_MAX ? sector : 0;
    }
#endif
    return Reader::SECTOR_MAX;
}

// Some file systems open a file for direct reads and then refuse each of them.
bool reads_directly(int descriptor) {
    alignas(Reader::SECTOR_MAX) char memory[Reader::SECTOR_MAX];
    return pread(descriptor, memory, sizeof(memory), 0) >= 0 || (errno != EINVAL && errno != EOPNOTSUPP);
}
#endif

} // namespace

Reader::Reader(ReaderOptions options) : options_(std::move(options)) {
    options_.piece = std::min(options_.piece, PIECE_MAX);
    try {
        std::vector<int64_t> handles;
        for (size_t i = 0; i < options_.files.size(); ++i) {
            files_.push_back(open_file(options_.files[i]));
            File & file = files_.back();
            identify(file, file.size, file.modified);
            if (file.size != options_.file_sizes[i]) {
                throw ReadError(file.path + " was changed while it was loaded; load it again");
            }
            handles.push_back(file.handle);
        }
        if (options_.method != 2) {
            pieces_ = make_uring_reader(handles, options_.queue_depth);
        }
        if (!pieces_ && options_.method != 1) {
            pieces_ = make_thread_reader(handles, std::min(options_.queue_depth, 16));
        }
        if (!pieces_) {
            throw ReadError("this system does not allow io_uring; use the reader \"threads\"");
        }
    } catch (...) {
        close_files();
        throw;
    }
}

Reader::~Reader() {
    abandon();
    drain();
    pieces_.reset();
    close_files();
}

void Reader::close_files() {
    for (File & file : files_) {
        close_file(file);
    }
    files_.clear();
}

#if defined(_WIN32)

Reader::File Reader::open_file(const std::string & path) {
    File file;
    file.path = path;
    const int length = MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, nullptr, 0);
    std::wstring wide(static_cast<size_t>(length), L'\0');
    MultiByteToWideChar(CP_UTF8, 0, path.c_str(), -1, wide.data(), length);
    // sectors of SECTOR_MAX suit every drive that unbuffered reads suit at all
    HANDLE handle = CreateFileW(wide.c_str(), GENERIC_READ, FILE_SHARE_READ, nullptr, OPEN_EXISTING,
                                FILE_FLAG_NO_BUFFERING | FILE_FLAG_OVERLAPPED, nullptr);
    if (handle == INVALID_HANDLE_VALUE) {
        throw ReadError("cannot open " + path + ": error " + std::to_string(GetLastError()));
    }
    file.handle = reinterpret_cast<int64_t>(handle);
    file.direct = true;
    return file;
}

void Reader::close_file(File & file) {
    CloseHandle(reinterpret_cast<HANDLE>(file.handle));
}

void Reader::identify(const File & file, uint64_t & size, uint64_t & modified) {
    BY_HANDLE_FILE_INFORMATION info;
    if (!GetFileInformationByHandle(reinterpret_cast<HANDLE>(file.handle), &info)) {
        throw ReadError("cannot look at " + file.path + ": error " + std::to_string(GetLastError()));
    }
    size = (static_cast<uint64_t>(info.nFileSizeHigh) << 32) | info.nFileSizeLow;
    modified = (static_cast<uint64_t>(info.ftLastWriteTime.dwHighDateTime) << 32) |
               info.ftLastWriteTime.dwLowDateTime;
}

#else

Reader::File Reader::open_file(const std::string & path) {
    File file;
    file.path = path;
    int descriptor = -1;
#if defined(__linux__) && defined(O_DIRECT)
    descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    file.sector = descriptor >= 0 ? direct_sector(descriptor) : 0;
    file.direct = file.sector > 0 && reads_directly(descriptor);
    if (descriptor >= 0 && !file.direct) {
        close(descriptor);
        descriptor = -1;
    }
#endif
    if (descriptor < 0) { // a file system without direct reads, such as an older tmpfs; stats say so
        descriptor = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    }
    if (descriptor < 0) {
        throw ReadError("cannot open " + path + ": " + reason(errno));
    }
    file.handle = descriptor;
#if defined(__linux__) && defined(O_DIRECT)
    file.sector = file.direct ? file.sector : 1;
#elif defined(__APPLE__)
    file.direct = fcntl(descriptor, F_NOCACHE, 1) == 0;
    file.sector = file.direct ? SECTOR_MAX : 1;
#else
    file.sector = 1;
#endif
    return file;
}

void Reader::close_file(File & file) {
    close(static_cast<int>(file.handle));
}

void Reader::identify(const File & file, uint64_t & size, uint64_t & modified) {
    struct stat status;
    if (fstat(static_cast<int>(file.handle), &status) != 0) {
        throw ReadError("cannot look at " + file.path + ": " + reason(errno));
    }
    size = static_cast<uint64_t>(status.st_size);
#if defined(__APPLE__)
    const timespec & time = status.st_mtimespec;
#else
    const timespec & time = status.st_mtim;
#endif
    modified = static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_nsec);
}

#endif

bool Reader::direct() const {
    return std::all_of(files_.begin(), files_.end(), [](const File & file) { return file.direct; });
}

void Reader::check_unchanged() const {
    for (const File & file : files_) {
        uint64_t size = 0, modified = 0;
        identify(file, size, modified);
        if (size < file.size) {
            throw ReadError(file.path + " was cut to " + std::to_string(size) +
                            " bytes while it was in use; restore it and load it again");
        }
        if (size != file.size || modified != file.modified) {
            throw ReadError(file.path + " was written to while it was in use; load it again");
        }
    }
}

uint64_t Reader::sector_range(int file, uint64_t offset, uint64_t nbytes) const {
    const uint64_t s = sector(file);
    const uint64_t begin = offset / s * s;
    return round_up(offset + nbytes, s) - begin;
}

void Reader::submit(const ReadRequest & request) {
    size_t index;
    if (free_active_.empty()) {
        index = active_.size();
        active_.emplace_back();
    } else {
        index = free_active_.back();
        free_active_.pop_back();
    }
    const uint64_t begin = request.offset - lead(request.file, request.offset);
    const uint64_t length = sector_range(request.file, request.offset, request.nbytes);
    const uint64_t needed = request.offset + request.nbytes - begin;
    active_[index] = Active{request, 0, false, true};
    *request.state = ReadState::loading;
    ++requests_under_way_;
    // pieces of whole sectors
    const uint64_t piece_bytes = std::max(options_.piece / SECTOR_MAX, uint64_t{1}) * SECTOR_MAX;
    for (uint64_t at = 0; at < length; at += piece_bytes) {
        Piece * piece;
        if (free_pieces_.empty()) {
            piece_storage_.emplace_back();
            piece = &piece_storage_.back();
        } else {
            piece = free_pieces_.back();
            free_pieces_.pop_back();
        }
        const uint64_t piece_length = std::min(piece_bytes, length - at);
        *piece = Piece{request.file,
                       begin + at,
                       piece_length,
                       needed > at ? std::min(piece_length, needed - at) : 0,
                       request.area + at,
                       index,
                       0};
        (request.ahead ? ahead_ : waiting_).push_back(piece);
        ++active_[index].pieces_left;
    }
    start_more();
}

void Reader::start_more() {
    batch_.clear();
    while (!waiting_.empty() && under_way_ < static_cast<size_t>(options_.queue_depth)) {
        start(waiting_);
    }
    // few, so that what is wanted next does not queue up behind them
    const int ahead_depth = std::min(options_.ahead_depth, options_.queue_depth);
    while (waiting_.empty() && !ahead_.empty() && under_way_ < static_cast<size_t>(ahead_depth)) {
        start(ahead_);
    }
    if (!batch_.empty()) {
        pieces_->start(batch_.data(), batch_.size());
    }
}

void Reader::start(std::deque<Piece *> & queue) {
    if (under_way_ == 0) {
        busy_since_ = clock_seconds();
    }
    if (timeline.on()) {
        queue.front()->started = clock_seconds();
    }
    batch_.push_back(queue.front());
    queue.pop_front();
    ++under_way_;
}

// The request with this state, of which a piece waits in the second queue; or one that is none.
size_t Reader::ahead_request(const ReadState * state) const {
    for (const Piece * piece : ahead_) {
        if (active_[piece->request].request.state == state) {
            return piece->request;
        }
    }
    return active_.size();
}

void Reader::promote(const ReadState * state) {
    const size_t request = ahead_request(state);
    if (request == active_.size()) {
        return;
    }
    const auto moved = std::stable_partition(ahead_.begin(), ahead_.end(),
                                             [&](const Piece * piece) { return piece->request != request; });
    waiting_.insert(waiting_.end(), moved, ahead_.end());
    ahead_.erase(moved, ahead_.end());
    start_more();
}

bool Reader::drop(ReadState * state) {
    const size_t request = ahead_request(state);
    if (request == active_.size()) {
        return false;
    }
    const auto left = std::stable_partition(ahead_.begin(), ahead_.end(),
                                            [&](const Piece * piece) { return piece->request != request; });
    if (static_cast<size_t>(ahead_.end() - left) < active_[request].pieces_left) {
        return false; // the rest is worth it: nobody else waits for it now
    }
    free_pieces_.insert(free_pieces_.end(), left, ahead_.end());
    ahead_.erase(left, ahead_.end());
    *state = ReadState::none;
    active_[request].used = false;
    free_active_.push_back(request);
    --requests_under_way_;
    return true;
}

void Reader::advance(int milliseconds) {
    if (under_way_ == 0) {
        return;
    }
    ended_.clear();
    pieces_->harvest(ended_, milliseconds);
    for (Piece * piece : ended_) {
        ended(piece);
    }
    start_more();
}

void Reader::drain() {
    while (under_way_ > 0) {
        advance(1000);
    }
}

void Reader::abandon() {
    for (std::deque<Piece *> * queue : {&waiting_, &ahead_}) {
        for (Piece * piece : *queue) {
            const size_t index = piece->request;
            free_pieces_.push_back(piece);
            active_[index].failed = true;
            error_ = "reading was given up";
            if (--active_[index].pieces_left == 0) {
                finish(index);
            }
        }
        queue->clear();
    }
}

void Reader::finish_all(const std::function<bool()> & stop) {
    while (!idle()) {
        wait(STOP_MILLISECONDS);
        if (stop()) {
            abandon();
            drain();
            throw ReadError("loading was cancelled");
        }
    }
}

void Reader::ended(Piece * piece) {
    if (--under_way_ == 0) {
        totals_.busy_seconds += clock_seconds() - busy_since_;
    }
    if (fault_count_ > 0) {
        if (fault_after_ > 0) {
            --fault_after_;
        } else {
            --fault_count_;
            piece->result = std::min<int64_t>(piece->result, fault_result_);
        }
    }
    if (piece->started > 0) {
        timeline.add(Event::What::read, piece->started);
    }
    Active & active = active_[piece->request];
    const File & file = files_[static_cast<size_t>(piece->fd_index)];
    const int64_t got = piece->result;
    // the last: the thread that asked has ended, and its reads with it
    if (got == -EINTR || got == -EAGAIN || got == -ECANCELED) {
        waiting_.push_front(piece);
        return;
    }
    if (got > 0) {
        totals_.bytes += static_cast<uint64_t>(got);
        ++totals_.pieces;
    }
    const uint64_t length = got > 0 ? static_cast<uint64_t>(got) : 0;
    if (got < 0) {
        active.failed = true;
        error_ =
            "reading " + file.path + " failed at byte " + std::to_string(piece->offset) + ": " + reason(-got);
    } else if (length < piece->needed) {
        if (length > 0 && length % file.sector == 0) { // it may stop early; it goes on from there
            piece->offset += length;
            piece->memory += length;
            piece->length -= length;
            piece->needed -= length;
            waiting_.push_front(piece);
            return;
        }
        active.failed = true;
        error_ = file.path + " ends at byte " + std::to_string(piece->offset + length) +
                 ", in the middle of a weight: it was cut while in use";
    }
    const size_t index = piece->request;
    free_pieces_.push_back(piece);
    if (--active.pieces_left == 0) {
        finish(index);
    }
}

void Reader::finish(size_t index) {
    const ReadRequest & request = active_[index].request;
    if (!active_[index].failed) {
        const char * landed = request.area + lead(request.file, request.offset);
        if (landed != request.target) {
            std::memmove(request.target, landed, request.nbytes);
        }
    }
    *request.state = active_[index].failed ? ReadState::failed : ReadState::ready;
    active_[index].used = false;
    free_active_.push_back(index);
    --requests_under_way_;
}

void Reader::read_now(int file, uint64_t offset, uint64_t nbytes, void * target) {
    ReadState state = ReadState::none;
    const uint64_t length = sector_range(file, offset, nbytes);
    std::vector<char> memory(length + SECTOR_MAX);
    char * area = memory.data();
    area += (SECTOR_MAX - reinterpret_cast<uintptr_t>(area) % SECTOR_MAX) % SECTOR_MAX;
    submit({file, offset, nbytes, area, area + lead(file, offset), &state});
    while (state == ReadState::loading) {
        wait(1000);
    }
    if (state == ReadState::failed) {
        throw ReadError(error_);
    }
    std::memcpy(target, area + lead(file, offset), nbytes);
}

void Reader::inject(int64_t result, int64_t after, int64_t count) {
    fault_result_ = result;
    fault_after_ = after;
    fault_count_ = count;
}

void Reader::hold(uint64_t order) {
    drain();
    pieces_ = make_held_reader(std::move(pieces_), order);
}

} // namespace tt
