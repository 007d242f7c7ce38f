// How XLA calls a kernel: a function of (ThreadPool, arguments, results, attributes) behind XLA's C
// interface.
//
// XLA has a C++ header for this. Its templates were half of what it took to compile the kernels,
// and a machine's first run waits for that.

#ifndef SLGR_JAX_KERNELS_CALLS_H_
#define SLGR_JAX_KERNELS_CALLS_H_

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "xla/ffi/api/c_api.h"

namespace slgr {

// XLA's own threads.
class ThreadPool {
 public:
  ThreadPool(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context)
      : api_(api), context_(context) {}

  int64_t num_threads() const {
    int64_t threads = 0;
    XLA_FFI_ThreadPool_NumThreads_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.num_threads = &threads;
    return Fails(api_->XLA_FFI_ThreadPool_NumThreads(&args)) ? 1 : threads;
  }

  // Runs a copy of `f` on one of the threads, or at once where there are none.
  template <typename F>
  void Schedule(const F& f) const {
    XLA_FFI_ThreadPool_Schedule_Args args{};
    args.struct_size = XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE;
    args.ctx = context_;
    args.data = new F(f);
    args.task = [](void* data) {
      F* const own = static_cast<F*>(data);
      (*own)();
      delete own;
    };
    if (Fails(api_->XLA_FFI_ThreadPool_Schedule(&args))) args.task(args.data);
  }

 private:
  bool Fails(XLA_FFI_Error* error) const {
    if (error == nullptr) return false;
    XLA_FFI_Error_Destroy_Args args{};
    args.struct_size = XLA_FFI_Error_Destroy_Args_STRUCT_SIZE;
    args.error = error;
    api_->XLA_FFI_Error_Destroy(&args);
    return true;
  }

  const XLA_FFI_Api* api_;
  XLA_FFI_ExecutionContext* context_;
};

// XLA's name of a type.
template <typename T> constexpr XLA_FFI_DataType kTypeOf = XLA_FFI_DataType_INVALID;
template <> constexpr XLA_FFI_DataType kTypeOf<float> = XLA_FFI_DataType_F32;
template <> constexpr XLA_FFI_DataType kTypeOf<int32_t> = XLA_FFI_DataType_S32;
template <> constexpr XLA_FFI_DataType kTypeOf<uint32_t> = XLA_FFI_DataType_U32;
template <> constexpr XLA_FFI_DataType kTypeOf<uint16_t> = XLA_FFI_DataType_U16;
template <> constexpr XLA_FFI_DataType kTypeOf<int64_t> = XLA_FFI_DataType_S64;
template <> constexpr XLA_FFI_DataType kTypeOf<bool> = XLA_FFI_DataType_PRED;

// An array that is an argument.
template <typename T>
struct Buffer {
  const XLA_FFI_Buffer* of;

  T* data() const { return static_cast<T*>(of->data); }
  int64_t size(int64_t axis) const { return of->dims[axis]; }
  int64_t count() const {
    int64_t all = 1;
    for (int64_t axis = 0; axis < of->rank; ++axis) all *= size(axis);
    return all;
  }
};

// One that is a result.
template <typename T>
struct Out : Buffer<T> {};

// A call whose parts are taken in the order of the function's parameters.
class Call {
 public:
  Call(XLA_FFI_CallFrame* frame, std::initializer_list<const char*> attributes)
      : frame_(*frame), name_(attributes.begin()) {}

  ThreadPool Take(ThreadPool*) { return {frame_.api, frame_.ctx}; }

  template <typename T>
  Buffer<T> Take(Buffer<T>*) {
    return {Array("argument", frame_.args.args, frame_.args.size, &arguments_, kTypeOf<T>)};
  }
  template <typename T>
  Out<T> Take(Out<T>*) {
    return {{Array("result", frame_.rets.rets, frame_.rets.size, &results_, kTypeOf<T>)}};
  }
  template <typename T>
  T Take(T*) {
    const void* const value = Number(*name_++, kTypeOf<T>);
    return value == nullptr ? T{} : *static_cast<const T*>(value);
  }

  // Nothing was missing, of another type, or left.
  bool Whole() {
    if (arguments_ < frame_.args.size) Refuse("argument", arguments_, "is not asked for");
    if (results_ < frame_.rets.size) Refuse("result", results_, "is not asked for");
    return wrong_[0] == 0;
  }

  XLA_FFI_Error* Error() const {
    XLA_FFI_Error_Create_Args args{};
    args.struct_size = XLA_FFI_Error_Create_Args_STRUCT_SIZE;
    args.message = wrong_;
    args.errc = XLA_FFI_Error_Code_INVALID_ARGUMENT;
    return frame_.api->XLA_FFI_Error_Create(&args);
  }

 private:
  const XLA_FFI_Buffer* Array(const char* what, void** all, int64_t size, int64_t* taken,
                              XLA_FFI_DataType type) {
    static const XLA_FFI_Buffer none{};
    const int64_t at = (*taken)++;
    if (at >= size) return Refuse(what, at, "is missing"), &none;
    const auto* found = static_cast<const XLA_FFI_Buffer*>(all[at]);
    if (found->dtype != type) {
      return Refuse(what, at, "is of another type"), &none;
    }
    return found;
  }

  const void* Number(const char* name, XLA_FFI_DataType type) {
    for (int64_t at = 0; at < frame_.attrs.size; ++at) {
      const XLA_FFI_ByteSpan& own = *frame_.attrs.names[at];
      if (own.len != std::strlen(name) || std::memcmp(own.ptr, name, own.len)) continue;
      const auto* found = static_cast<const XLA_FFI_Scalar*>(frame_.attrs.attrs[at]);
      if (frame_.attrs.types[at] == XLA_FFI_AttrType_SCALAR && found->dtype == type) {
        return found->value;
      }
    }
    std::snprintf(wrong_, sizeof wrong_, "slgr kernel: no attribute '%s' of the right type", name);
    return nullptr;
  }

  void Refuse(const char* what, int64_t at, const char* why) {
    std::snprintf(wrong_, sizeof wrong_, "slgr kernel: %s %d %s", what, static_cast<int>(at), why);
  }

  const XLA_FFI_CallFrame& frame_;
  const char* const* name_;
  int64_t arguments_ = 0, results_ = 0;
  char wrong_[96] = "";
};

// Braces, so that parts are taken from left to right.
template <typename... P>
struct Dispatch {
  Dispatch(Call& call, void (*kernel)(P...), P... parts) {
    if (call.Whole()) kernel(parts...);
  }
};

template <typename... P>
XLA_FFI_Error* Answer(XLA_FFI_CallFrame* frame, void (*kernel)(P...),
                      std::initializer_list<const char*> attributes) {
  auto* const more = frame->extension_start;  // whose type newer jaxlibs call otherwise
  if (more != nullptr && more->type == XLA_FFI_Extension_Metadata) {
    auto* const metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(more)->metadata;
    metadata->api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                             XLA_FFI_API_MINOR};
    metadata->traits = 0;
    metadata->state_type_id = XLA_FFI_UNKNOWN_TYPE_ID;
    return nullptr;
  }
  Call call(frame, attributes);
  Dispatch<P...>{call, kernel, call.Take(static_cast<P*>(nullptr))...};
  return call.Whole() ? nullptr : call.Error();
}

// Defines `symbol`, which XLA calls, by a kernel and the names of its attributes.
#define SLGR_KERNEL(symbol, kernel, ...)                         \
  extern "C" XLA_FFI_Error* symbol(XLA_FFI_CallFrame* frame) {   \
    return slgr::Answer(frame, kernel, {__VA_ARGS__});           \
  }

}  // namespace slgr

#endif  // SLGR_JAX_KERNELS_CALLS_H_
