// Our ggml device: where it is registered (device.cpp) and how it computes (backend.cpp).
#pragma once

#include "ggml_interfaces.h"
#include "store.h"

#include <memory>

namespace tt {

// Registers the device "TIER" with ggml, once per process. ReadError where that is not possible.
Device * tier_device();

// A buffer type whose tensors belong to the store; with no store, one that only stands for such tensors.
// Its buffers keep it alive, and it the store.
struct PagedType : std::enable_shared_from_this<PagedType> {
    BufferType type{};
    std::shared_ptr<Store> store;
};
std::shared_ptr<PagedType> make_paged_type(std::shared_ptr<Store> store);

// Whether a tensor, or what it is a view of, lies in a buffer of ours.
bool is_paged(const Tensor * tensor);

// The device whose kernels compute on what was read.
Device * inner_device();

// Numbers of the operations we look at, found by name.
struct Operations {
    int none, view, reshape, permute, transpose, mul, add, mul_mat, mul_mat_id, glu, unary, scale, clamp;
};
const Operations & operations();

// A backend (one per context).
Backend * make_backend(Device * device);
void set_threads(Backend * backend, int threads);
void set_abort_callback(Backend * backend, bool (*callback)(void * data), void * data);

} // namespace tt
