// Asynchronous reads from the drive into memory of ours, past the page cache where the file system allows it.
//
// Not thread-safe: one thread at a time submits, polls and waits. Memory of a read under way belongs to the
// reader until the read's state says otherwise.
#pragma once

#include "timeline.h"

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace tt {

inline uint64_t round_up(uint64_t value, uint64_t to) {
    return (value + to - 1) / to * to;
}

// A file could not be read, or is not what it was. The message is one line for the user.
class ReadError : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

enum class ReadState : uint8_t { none, loading, ready, failed };

struct ReadRequest {
    int file = 0;
    uint64_t offset = 0; // of the first byte wanted
    uint64_t nbytes = 0;
    // Memory for the range of whole sectors that encloses the bytes: sector_range() long, aligned to a sector
    // and a cache line.
    char * area = nullptr;
    // Where the first byte must be in the end, in the area. Where the sectors put it elsewhere, it is moved.
    char * target = nullptr;
    ReadState * state = nullptr; // loading until the read has ended
    bool ahead = false;          // wanted later, perhaps: starts when nothing that is wanted now waits
};

struct ReaderOptions {
    std::vector<std::string> files;
    std::vector<uint64_t> file_sizes; // as the header was read
    int method = 0;                   // 0: the best there is; 1: io_uring; 2: threads
    int queue_depth = 32;             // pieces under way at a time
    int ahead_depth = 8;              // while only reads ahead wait
    uint64_t piece = 1 << 20;         // bytes of the largest piece
};

struct ReaderTotals {
    uint64_t bytes = 0; // read from the drive, whole sectors
    uint64_t pieces = 0;
    double busy_seconds = 0; // with at least one piece under way
};

// One piece of a request, as the operating system is asked for it.
struct Piece {
    int fd_index = 0;
    uint64_t offset = 0;
    uint64_t length = 0; // whole sectors
    uint64_t needed = 0; // of the length: the rest may lie past the end of the file
    char * memory = nullptr;
    size_t request = 0;
    int64_t result = 0; // bytes, or a negative errno
    double started = 0; // kept while there is a timeline
};

// How pieces get read: through io_uring, or by threads that block.
class PieceReader {
public:
    virtual ~PieceReader() = default;
    virtual void start(Piece * const * pieces, size_t count) = 0;
    // Those that have ended since the last call; waits for one, for about `milliseconds` at most.
    virtual void harvest(std::vector<Piece *> & ended, int milliseconds) = 0;
    virtual const char * name() const = 0;
};

class Reader {
public:
    static constexpr uint64_t SECTOR_MAX = 4096;
    static constexpr uint64_t CACHE_LINE = 64;
    static constexpr uint64_t PIECE_MAX = 1u << 30; // every system takes so much at a time

    // Opens the files. ReadError where one is not there, or has another size than its header was read with.
    explicit Reader(ReaderOptions options);
    ~Reader(); // waits for what is under way
    Reader(const Reader &) = delete;
    Reader & operator=(const Reader &) = delete;

    // The granularity of reads of a file.
    uint64_t sector(int file) const { return files_[static_cast<size_t>(file)].sector; }
    // Bytes of memory that a request needs, and how far into them its first byte comes to lie.
    uint64_t sector_range(int file, uint64_t offset, uint64_t nbytes) const;
    uint64_t lead(int file, uint64_t offset) const { return offset % sector(file); }

    void submit(const ReadRequest & request);
    // A read ahead, known by its state, is wanted now; nothing happens where it is none, or has ended.
    void promote(const ReadState * state);
    // Gives up a read ahead of which nothing was asked of the drive yet: its state is none again. False where
    // it goes on.
    bool drop(ReadState * state);
    // Looks after what has ended, without waiting.
    void poll() { advance(0); }
    // Waits until something has ended, for about `milliseconds` at most. Does nothing where nothing is under
    // way.
    void wait(int milliseconds) { advance(milliseconds); }
    void drain(); // waits until nothing is under way
    // What waits to be asked of the drive is not asked any more; it has failed then. The rest goes on.
    void abandon();
    // Waits until all is read; ReadError where `stop`, asked now and then, says so: the rest is abandoned
    // then.
    void finish_all(const std::function<bool()> & stop);
    bool idle() const { return requests_under_way_ == 0; }

    // Of these reads, and of what is computed between them.
    Timeline timeline;

    // Why a request last failed.
    const std::string & error() const { return error_; }
    // ReadError where a file was written to, cut or replaced since it was opened.
    void check_unchanged() const;

    // Reads at once, for what is not worth a place of its own.
    void read_now(int file, uint64_t offset, uint64_t nbytes, void * target);

    const ReaderTotals & totals() const { return totals_; }
    const char * method() const { return pieces_->name(); }
    bool direct() const; // whether all files are read past the page cache

    // For tests: after `after` more pieces, the next `count` of them end with `result` (a negative errno, or
    // a number of bytes that is less than was asked).
    void inject(int64_t result, int64_t after, int64_t count);
    // For tests: from now on reads end one by one, while somebody waits (make_held_reader).
    void hold(uint64_t order);

private:
    struct File {
        std::string path;
        int64_t handle = -1; // a file descriptor, or a HANDLE
        uint64_t size = 0;
        uint64_t modified = 0; // nanoseconds
        uint64_t sector = SECTOR_MAX;
        bool direct = false;
    };
    struct Active {
        ReadRequest request;
        size_t pieces_left = 0;
        bool failed = false;
        bool used = false;
    };

    static File open_file(const std::string & path);
    static void close_file(File & file);
    void close_files();
    size_t ahead_request(const ReadState * state) const;
    void start(std::deque<Piece *> & queue);
    static void identify(const File & file, uint64_t & size, uint64_t & modified);
    void advance(int milliseconds);
    void start_more();
    void ended(Piece * piece);
    void finish(size_t index);

    ReaderOptions options_;
    std::vector<File> files_;
    std::deque<Active> active_; // a deque: its elements stay where they are
    std::vector<size_t> free_active_;
    std::deque<Piece> piece_storage_;
    std::vector<Piece *> free_pieces_;
    std::deque<Piece *> waiting_, ahead_;
    std::vector<Piece *> batch_, ended_;
    size_t under_way_ = 0;          // pieces
    size_t requests_under_way_ = 0; // waiting ones too
    std::string error_;
    ReaderTotals totals_;
    double busy_since_ = 0;
    int64_t fault_result_ = 0, fault_after_ = 0, fault_count_ = 0;
    std::unique_ptr<PieceReader> pieces_; // last: it goes first
};

// io_uring, or null where the kernel has none or does not allow it.
std::unique_ptr<PieceReader> make_uring_reader(const std::vector<int64_t> & handles, int depth);
std::unique_ptr<PieceReader> make_thread_reader(const std::vector<int64_t> & handles, int threads);

// For tests: ends one read each time that somebody waits, and none otherwise. `order`: 0, the first that was
// asked for; 1, the last; any other: one at random, the same in each run, and now and then one for who only
// looks.
std::unique_ptr<PieceReader> make_held_reader(std::unique_ptr<PieceReader> inner, uint64_t order);
// How often in this process the memory of a held read was given to another, written to or freed before the
// read had ended.
int64_t reads_misused();

} // namespace tt
