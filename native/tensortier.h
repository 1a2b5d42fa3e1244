// The C interface of the native plug-in, as Python calls it.
//
// Everything here is safe to call from any thread once tt_bind has returned 0. Strings are UTF-8.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define TT_API extern "C" __declspec(dllexport)
#else
#define TT_API extern "C" __attribute__((visibility("default")))
#endif

// Finds the functions of ggml and llama.cpp in the library at `libllama_path`, which the process must have
// loaded already, and checks that its structures are the ones this plug-in was written for. Returns 0, or 1
// with one line of explanation in `error` (always terminated). After a success, later calls change nothing.
TT_API int tt_bind(const char * libllama_path, char * error, size_t error_size);

// The version of ggml this plug-in was written for, such as "0.25.3".
TT_API const char * tt_ggml_version(void);

// What one buffer type holds for a context, in bytes.
struct tt_memory_row {
    char buffer_type[64];
    char device[128]; // ggml's name of the device; "CPU" for every buffer in host memory
    uint64_t weights; // the model's tensors
    uint64_t context; // KV cache and recurrent state
    uint64_t compute; // the scheduler's buffers for intermediate results
};

// llama.cpp's own account of a context's memory (llama_get_memory_breakdown, a C++ function). Writes up to
// `capacity` rows and returns how many there are, or -1 when tt_bind has not succeeded.
TT_API int tt_memory_breakdown(const void * llama_context, struct tt_memory_row * rows, int capacity);

// A ggml_abort_callback: true once *flag (an int32_t that outlives the context) is not 0. Native, because
// ggml asks after every node of the graph and a call into Python there would cost more than the node.
TT_API bool tt_should_abort(void * flag);

// Sets or clears such a flag, visible to all threads.
TT_API void tt_set_flag(int32_t * flag, int32_t value);

// One graph of `count` products of different weights, so that none is found in a cache.
struct tt_mul_mat_bench {
    const char * device; // ggml's name
    int32_t type;        // ggml_type of the weights
    int32_t count;       // matrices in the graph
    int64_t k;           // columns: the input's width
    int64_t n;           // rows: the output's width
    int64_t batch;       // tokens
    int32_t experts;     // 0: MUL_MAT; else MUL_MAT_ID with so many experts in each weight ...
    int32_t used;        // ... of which each token uses these
    int32_t threads;     // for backends that have threads
    int32_t repack;      // 1: weights in the CPU backend's reordering buffer type
};

// Runs it once and then `capacity` times; seconds of each run. Returns the number of runs, 0 when the device
// has no kernel for this, or -1 with one line in `error`.
TT_API int tt_bench_mul_mat(const struct tt_mul_mat_bench * bench, double * seconds, int capacity,
                            char * error, size_t error_size);

// One graph of `count` attentions (FLASH_ATTN_EXT), each over KV caches of its own.
struct tt_attention_bench {
    const char * device;
    int32_t type; // of keys and values
    int32_t count;
    int64_t head_dim; // of keys and of values
    int64_t heads;
    int64_t kv_heads;
    int64_t cells; // tokens in the cache
    int64_t batch; // tokens that ask
    int32_t threads;
};

// As tt_bench_mul_mat.
TT_API int tt_bench_attention(const struct tt_attention_bench * bench, double * seconds, int capacity,
                              char * error, size_t error_size);

// One graph of `count` small operations on `rows` vectors of `width` values, each on the last one's result: a
// norm, a product and a sum in turn, as between the weights of a layer.
struct tt_small_ops_bench {
    const char * device;
    int32_t count;
    int64_t width;
    int64_t rows; // tokens
    int32_t threads;
};

// As tt_bench_mul_mat.
TT_API int tt_bench_small_ops(const struct tt_small_ops_bench * bench, double * seconds, int capacity,
                              char * error, size_t error_size);

// Copies between main memory and a device's own.
struct tt_copy_bench {
    const char * device;
    int64_t bytes;
    int32_t pinned;    // 1: main memory that the device's driver allocated
    int32_t to_device; // 0: from the device
};

// As tt_bench_mul_mat; 0 runs where the device has no pinned memory to offer.
TT_API int tt_bench_copy(const struct tt_copy_bench * bench, double * seconds, int capacity, char * error,
                         size_t error_size);

// Weights that stay on the drive and are read while the model runs: a "tier".

// One tensor of the model whose data stays in the file.
struct tt_tier_tensor {
    const char * name;
    int32_t kind;    // 0: used by every token; 1: routed experts; 2: small and always in memory
    int32_t group;   // of experts: the layer's number among those with experts
    int32_t part;    // of experts: in the order in which a layer uses them
    int32_t experts; // of experts: how many
    int32_t file;    // index into the files
    uint64_t offset; // of the data, from the start of the file
    uint64_t nbytes;
};

struct tt_tier_config {
    const char * const * files;
    const uint64_t * file_sizes;
    int32_t n_files;
    const struct tt_tier_tensor * tensors; // in the order of use
    int32_t n_tensors;
    int32_t n_groups;
    int32_t used;             // experts that a token uses in a layer
    int32_t policy;           // 0: lru, 1: global-lru, 2: lfu, 3: static, 4: second-touch
    uint64_t expert_bytes;    // memory for experts
    uint64_t dense_bytes;     // memory for the weights of kind 0
    const double * frequency; // policy 3: of each expert, [n_groups][most experts of a group]; else null
    int32_t reader;           // 0: the best there is, 1: io_uring, 2: threads
    int32_t queue_depth;      // reads under way at a time
    uint64_t read_bytes;      // of the largest single read
    int32_t guesses;          // experts read ahead per layer; 0: none, -1: where that is measured to gain
};

// What a tier has done since it was opened. Bytes are those of weights; drive_bytes are whole sectors.
struct tt_tier_stats {
    uint64_t memory_bytes;   // allocated: slots, resident weights and the ring
    uint64_t scratch_bytes;  // the most that rows gathered and computed apart took beside it
    uint64_t expert_slots;   // for experts that stay
    uint64_t passing_slots;  // for those that do not
    uint64_t resident_bytes; // weights of kind 0 that stay
    uint64_t ring_bytes;
    uint64_t dense_uses;
    uint64_t dense_hits;
    uint64_t dense_bytes;
    double dense_stall_seconds;
    uint64_t drive_bytes;
    uint64_t drive_reads;
    double drive_busy_seconds; // with at least one read under way
    int32_t direct;            // 1: past the page cache
    int32_t locked;            // 1: the memory cannot be swapped out
    int32_t guessing;          // 1: experts are read ahead now
    char reader[16];
};

struct tt_tier_group_stats {
    uint64_t passes;
    uint64_t uses;        // distinct experts, summed over passes
    uint64_t hits;        // of these, in memory when the pass began; not those that were read ahead
    uint64_t bytes;       // read for the others
    uint64_t guess_uses;  // uses of passes for which there was a guess
    uint64_t guess_named; // of these, named by it
    uint64_t guess_reads; // experts read ahead
    uint64_t guess_found; // of these, used in the pass that they were read for
    double stall_seconds;
    int32_t capacity; // experts that stay; of all groups together for policy 1
};

// Opens the files and allocates the memory. Null, with one line in `error`, where that fails.
TT_API void * tt_tier_open(const struct tt_tier_config * config, char * error, size_t error_size);

// A ggml_backend_buffer_type for the tensors of the configuration. Lives until the tier is closed and the
// last buffer of this type is freed.
TT_API void * tt_tier_buffer_type(void * tier);

// A buffer type that only says where tensors would be: for models loaded without data. Null, with one line in
// `error`, where the device cannot be registered.
TT_API void * tt_tier_planned_buffer_type(char * error, size_t error_size);

// Asked now and then while much is read: not 0 where nobody wants it any more. Null: always wanted.
typedef int32_t (*tt_tier_stop)(void);

// To be called once, when llama.cpp has loaded the model and before a context is made of it. Reads the
// weights that stay. Returns 0, or 1 with one line in `error`.
TT_API int tt_tier_loaded(void * tier, tt_tier_stop stop, char * error, size_t error_size);

// Reads experts that are likely to be used into free slots: pairs of (group, expert), likeliest last. Returns
// how many were read, or -1 with one line in `error`.
TT_API int64_t tt_tier_warm(void * tier, const int32_t * pairs, int64_t count, tt_tier_stop stop,
                            char * error, size_t error_size);

// The experts that stay now, in the order that tt_tier_warm takes: writes up to `capacity` pairs and returns
// how many there are, or 0 where there is no memory to list them.
TT_API int64_t tt_tier_residents(void * tier, int32_t * pairs, int64_t capacity);

// How many experts would stay of each group (for policy 1: of all groups, once), were this opened on a drive
// that reads `sector` bytes at least. Opens and allocates nothing. Returns how many numbers there are, or -1
// with one line in `error`.
TT_API int32_t tt_tier_capacities(const struct tt_tier_config * config, uint64_t sector, int32_t * capacities,
                                  int32_t size, char * error, size_t error_size);

// Why a computation last failed; empty where none has since the last call.
TT_API void tt_tier_error(void * tier, char * error, size_t error_size);

TT_API void tt_tier_stats_get(void * tier, struct tt_tier_stats * stats);

// Writes up to `capacity` rows and returns how many groups there are.
TT_API int tt_tier_group_stats_get(void * tier, struct tt_tier_group_stats * rows, int capacity);

// Writes the routing of each pass to a file from now on: int32 group, tokens, used, then the ids, one token
// after another. Null ends it. Returns 0, or 1 with one line in `error`.
TT_API int tt_tier_trace(void * tier, const char * path, char * error, size_t error_size);

struct tt_tier_event {
    double begin; // seconds, of a clock that only goes forward
    double end;   // of a read: when it was noticed
    int32_t what; // 0: a read of at most read_bytes; 1: computing with weights from the drive; 2: waiting for
                  // the drive with nothing to compute; 3: a pass begins: the experts of a layer are known
    int32_t group; // of a pass
};

// Keeps the first `capacity` events from now on; 0 ends that.
TT_API void tt_tier_timeline(void * tier, int64_t capacity);

// Writes up to `capacity` of them and returns how many there are.
TT_API int64_t tt_tier_timeline_get(void * tier, struct tt_tier_event * events, int64_t capacity);

// For tests: after `after` more reads, the next `count` end with `result`: a negative errno, or fewer bytes
// than were asked for.
TT_API void tt_tier_inject(void * tier, int64_t result, int64_t after, int64_t count);

// For tests: from now on a read ends only when somebody waits for one, one each time, and until then its
// memory holds what is no number. `order`: 0, the first that was asked for ends first; 1, the last; any
// other: at random, the same in each run, and now and then one ends without anybody waiting.
TT_API void tt_tier_hold(void * tier, uint64_t order);

// For tests: how often in this process the memory of a read so held was given to another read, written to or
// freed before the read had ended.
TT_API int64_t tt_reads_misused(void);

// Everything ends once the buffers of its type are freed too.
TT_API void tt_tier_close(void * tier);

// Random reads of a file by the reader of a tier, `depth` of `block` bytes at a time, for about `seconds`.
// Returns bytes/s, or -1 with one line in `error`. `reader` as in tt_tier_config.
TT_API double tt_bench_reads(const char * path, uint64_t file_size, int32_t reader, int32_t depth,
                             uint64_t block, double seconds, char * error, size_t error_size);

// A policy and its room, for a replay of recorded routing.
struct tt_policy {
    int32_t kind; // as tt_tier_config.policy
    int32_t groups;
    int32_t experts;          // the most that a group has
    const int32_t * capacity; // [groups]; one number for policy 1
    const double * frequency; // policy 3: [groups][experts]; else null
};

// Replays a trace (records as tt_tier_trace writes them, `length` numbers) and adds to `hits` and `uses` of
// each group. Returns the number of passes, or -1 with one line in `error`.
TT_API int64_t tt_policy_replay(const struct tt_policy * policy, const int32_t * trace, size_t length,
                                uint64_t * hits, uint64_t * uses, char * error, size_t error_size);
