// The two ways to have many reads under way: io_uring through its system calls, and threads that block.

#include "reader.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#if defined(_WIN32)
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <unistd.h>
#endif

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#include <linux/time_types.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#if defined(SYS_io_uring_setup) && defined(IORING_ENTER_EXT_ARG)
#define TT_HAVE_URING 1
#endif
#endif
#endif

namespace tt {
namespace {

// Bytes read, or a negative errno.
int64_t read_at(int64_t handle, const Piece & piece) {
#if defined(_WIN32)
    OVERLAPPED where{};
    where.Offset = static_cast<DWORD>(piece.offset);
    where.OffsetHigh = static_cast<DWORD>(piece.offset >> 32);
    where.hEvent = CreateEventW(nullptr, TRUE, FALSE, nullptr);
    HANDLE file = reinterpret_cast<HANDLE>(handle);
    DWORD got = 0;
    BOOL fine = ReadFile(file, piece.memory, static_cast<DWORD>(piece.length), nullptr, &where);
    if (fine || GetLastError() == ERROR_IO_PENDING) {
        fine = GetOverlappedResult(file, &where, &got, TRUE);
    }
    const DWORD error = fine ? ERROR_SUCCESS : GetLastError();
    CloseHandle(where.hEvent);
    if (!fine && error == ERROR_HANDLE_EOF) {
        return 0;
    }
    return fine ? static_cast<int64_t>(got) : -static_cast<int64_t>(EIO);
#else
    const ssize_t got =
        pread(static_cast<int>(handle), piece.memory, piece.length, static_cast<off_t>(piece.offset));
    return got >= 0 ? static_cast<int64_t>(got) : -static_cast<int64_t>(errno);
#endif
}

class ThreadReader : public PieceReader {
public:
    ThreadReader(std::vector<int64_t> handles, int threads) : handles_(std::move(handles)) {
        threads_.reserve(static_cast<size_t>(threads));
        try {
            while (threads_.size() < static_cast<size_t>(threads)) {
                threads_.emplace_back([this] { work(); });
            }
        } catch (const std::exception & error) {
            if (threads_.empty()) { // with fewer than were wanted it goes on
                throw ReadError(std::string("no thread can be started to read: ") + error.what());
            }
        }
    }
    ~ThreadReader() override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        todo_changed_.notify_all();
        for (std::thread & thread : threads_) {
            thread.join();
        }
    }
    void start(Piece * const * pieces, size_t count) override {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            todo_.insert(todo_.end(), pieces, pieces + count);
        }
        if (count == 1) {
            todo_changed_.notify_one();
        } else {
            todo_changed_.notify_all();
        }
    }
    void harvest(std::vector<Piece *> & ended, int milliseconds) override {
        std::unique_lock<std::mutex> lock(mutex_);
        if (done_.empty() && milliseconds > 0) {
            done_changed_.wait_for(lock, std::chrono::milliseconds(milliseconds),
                                   [this] { return !done_.empty(); });
        }
        ended.insert(ended.end(), done_.begin(), done_.end());
        done_.clear();
    }
    const char * name() const override { return "threads"; }

private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        while (true) {
            todo_changed_.wait(lock, [this] { return stop_ || !todo_.empty(); });
            if (stop_) {
                return; // the reader drains before it ends, so nothing is left to do
            }
            Piece * piece = todo_.front();
            todo_.pop_front();
            lock.unlock();
            const int64_t result = read_at(handles_[static_cast<size_t>(piece->fd_index)], *piece);
            lock.lock();
            piece->result = result;
            done_.push_back(piece);
            done_changed_.notify_one();
        }
    }

    const std::vector<int64_t> handles_;
    std::mutex mutex_;
    std::condition_variable todo_changed_, done_changed_;
    std::deque<Piece *> todo_;
    std::vector<Piece *> done_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

#if defined(TT_HAVE_URING)

// The two rings are memory shared with the kernel. Each side owns one index of each ring and reads the
// other's with acquire, writes its own with release (io_uring(7)).
class UringReader : public PieceReader {
public:
    explicit UringReader(std::vector<int64_t> handles) : handles_(std::move(handles)) {}
    ~UringReader() override {
        unmap(entries_, entries_bytes_);
        unmap(completions_, completions_bytes_);
        unmap(submissions_, submissions_bytes_);
        if (ring_ >= 0) {
            close(ring_);
        }
    }

    // False where the kernel does not do it.
    bool open(int depth) {
        io_uring_params params{};
        ring_ = static_cast<int>(syscall(SYS_io_uring_setup, static_cast<unsigned>(depth), &params));
        if (ring_ < 0 || !(params.features & IORING_FEAT_EXT_ARG)) {
            return false;
        }
        submissions_bytes_ = params.sq_off.array + params.sq_entries * sizeof(unsigned);
        completions_bytes_ = params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe);
        entries_bytes_ = params.sq_entries * sizeof(io_uring_sqe);
        submissions_ = map(submissions_bytes_, IORING_OFF_SQ_RING);
        completions_ = map(completions_bytes_, IORING_OFF_CQ_RING);
        entries_ = map(entries_bytes_, IORING_OFF_SQES);
        if (!submissions_ || !completions_ || !entries_) {
            return false;
        }
        sq_tail_ = field(submissions_, params.sq_off.tail);
        sq_array_ = field(submissions_, params.sq_off.array);
        sq_mask_ = *field(submissions_, params.sq_off.ring_mask);
        cq_head_ = field(completions_, params.cq_off.head);
        cq_tail_ = field(completions_, params.cq_off.tail);
        cq_mask_ = *field(completions_, params.cq_off.ring_mask);
        cqes_ = reinterpret_cast<const io_uring_cqe *>(completions_ + params.cq_off.cqes);
        sqes_ = reinterpret_cast<io_uring_sqe *>(entries_);
        return enter(0, 0); // some sandboxes allow a ring, but not its use
    }

    // The reader never has more pieces under way than the ring has entries, so there is always a free one.
    void start(Piece * const * pieces, size_t count) override {
        unsigned tail = *sq_tail_; // only we write it
        for (size_t i = 0; i < count; ++i) {
            const unsigned slot = tail & sq_mask_;
            io_uring_sqe & entry = sqes_[slot];
            std::memset(&entry, 0, sizeof(entry));
            entry.opcode = IORING_OP_READ;
            entry.fd = static_cast<int>(handles_[static_cast<size_t>(pieces[i]->fd_index)]);
            entry.off = pieces[i]->offset;
            entry.addr = reinterpret_cast<uintptr_t>(pieces[i]->memory);
            entry.len = static_cast<unsigned>(pieces[i]->length);
            entry.user_data = reinterpret_cast<uintptr_t>(pieces[i]);
            sq_array_[slot] = slot;
            ++tail;
        }
        __atomic_store_n(sq_tail_, tail, __ATOMIC_RELEASE);
        to_submit_ += static_cast<unsigned>(count);
        enter(0, 0);
    }

    void harvest(std::vector<Piece *> & ended, int milliseconds) override {
        if (take(ended) || (milliseconds == 0 && to_submit_ == 0)) {
            return;
        }
        enter(milliseconds > 0 ? 1 : 0, milliseconds);
        take(ended);
    }
    const char * name() const override { return "io_uring"; }

private:
    char * map(size_t bytes, off_t what) const {
        void * memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_, what);
        return memory == MAP_FAILED ? nullptr : static_cast<char *>(memory);
    }
    static void unmap(char * memory, size_t bytes) {
        if (memory) {
            munmap(memory, bytes);
        }
    }
    static unsigned * field(char * ring, unsigned offset) {
        return reinterpret_cast<unsigned *>(ring + offset);
    }

    // Hands over what was queued, and waits for `least` completions for about `milliseconds` at most. What
    // the kernel does not take now (it has no memory for the moment) is handed over the next time; false
    // then.
    bool enter(unsigned least, int milliseconds) {
        __kernel_timespec limit{};
        limit.tv_sec = milliseconds / 1000;
        limit.tv_nsec = static_cast<long long>(milliseconds % 1000) * 1000000;
        io_uring_getevents_arg argument{};
        argument.ts = reinterpret_cast<uintptr_t>(&limit);
        const unsigned flags = IORING_ENTER_EXT_ARG | (least ? IORING_ENTER_GETEVENTS : 0u);
        const long taken =
            syscall(SYS_io_uring_enter, ring_, to_submit_, least, flags, &argument, sizeof(argument));
        if (taken > 0) {
            to_submit_ -= static_cast<unsigned>(taken);
        }
        return taken >= 0;
    }
    bool take(std::vector<Piece *> & ended) {
        unsigned head = *cq_head_; // only we write it
        const unsigned tail = __atomic_load_n(cq_tail_, __ATOMIC_ACQUIRE);
        const bool any = head != tail;
        for (; head != tail; ++head) {
            const io_uring_cqe & completion = cqes_[head & cq_mask_];
            Piece * piece = reinterpret_cast<Piece *>(static_cast<uintptr_t>(completion.user_data));
            piece->result = completion.res;
            ended.push_back(piece);
        }
        __atomic_store_n(cq_head_, head, __ATOMIC_RELEASE);
        return any;
    }

    const std::vector<int64_t> handles_;
    int ring_ = -1;
    char * submissions_ = nullptr;
    char * completions_ = nullptr;
    char * entries_ = nullptr;
    size_t submissions_bytes_ = 0, completions_bytes_ = 0, entries_bytes_ = 0;
    unsigned *sq_tail_ = nullptr, *sq_array_ = nullptr, *cq_head_ = nullptr, *cq_tail_ = nullptr;
    unsigned sq_mask_ = 0, cq_mask_ = 0;
    const io_uring_cqe * cqes_ = nullptr;
    io_uring_sqe * sqes_ = nullptr;
    unsigned to_submit_ = 0;
};

#endif

} // namespace

std::unique_ptr<PieceReader> make_thread_reader(const std::vector<int64_t> & handles, int threads) {
    return std::make_unique<ThreadReader>(handles, std::max(threads, 1));
}

#if defined(TT_HAVE_URING)
std::unique_ptr<PieceReader> make_uring_reader(const std::vector<int64_t> & handles, int depth) {
    auto reader = std::make_unique<UringReader>(handles);
    return reader->open(std::max(depth, 1)) ? std::move(reader) : nullptr;
}
#else
std::unique_ptr<PieceReader> make_uring_reader(const std::vector<int64_t> &, int) {
    return nullptr;
}
#endif

} // namespace tt
