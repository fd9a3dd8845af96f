// Horovod's collectives in memory that the ranks of one host share: added to Horovod by hvdformer (see shared_memory.h).
//
// Alltoall is not among them: hvdformer uses it for `wire: bf16`, which is for networks.

#ifndef HOROVOD_SHARED_MEMORY_OPERATIONS_H
#define HOROVOD_SHARED_MEMORY_OPERATIONS_H

#include "../shared_memory.h"
#include "collective_operations.h"

#if HOROVOD_HAS_SHARED_MEMORY

#include <functional>
#include <numeric>

namespace horovod {
namespace common {

// The memory of all ranks, opened by the first call; null where they have none. All it depends on is the same on every rank.
inline SharedMemory* SharedMemoryFor(HorovodGlobalState* global_state,
                                     const TensorTableEntry& entry) {
  if (entry.device != CPU_DEVICE_ID || entry.process_set_id != 0) {
    return nullptr;
  }
  Controller& controller = *global_state->process_set_table.Get(0).controller;
  if (!controller.has_asked_for_shared_memory) {
    controller.has_asked_for_shared_memory = true;
    if (controller.GetSize() > 1 &&
        controller.GetLocalSize() == controller.GetSize()) {
      controller.shared_memory = SharedMemory::Open(controller);
    }
  }
  return controller.shared_memory.get();
}

// Call f(pointer of the type of the numbers), or return false where it is none of those that are folded here.
template <typename Function> bool WithNumbers(DataType type, Function f) {
  switch (type) {
  case HOROVOD_INT32:
    f((int32_t*)nullptr);
    return true;
  case HOROVOD_INT64:
    f((int64_t*)nullptr);
    return true;
  case HOROVOD_FLOAT32:
    f((float*)nullptr);
    return true;
  case HOROVOD_FLOAT64:
    f((double*)nullptr);
    return true;
  default:
    return false;
  }
}

// Call f(what makes one number of two), or return false where it is none of those that are known here. NaN stays NaN.
template <typename Function> bool WithOperation(ReduceOp op, Function f) {
  switch (op) {
  case ReduceOp::SUM:
  case ReduceOp::AVERAGE:
    f(std::plus<>());
    return true;
  case ReduceOp::MIN:
    f([](auto a, auto b) { return a < b || a != a ? a : b; });
    return true;
  case ReduceOp::MAX:
    f([](auto a, auto b) { return a > b || a != a ? a : b; });
    return true;
  default:
    return false;
  }
}

class SharedMemoryAllreduce : public AllreduceOp {
public:
  using AllreduceOp::AllreduceOp;

  bool Enabled(const ParameterManager& param_manager,
               const std::vector<TensorTableEntry>& entries,
               const Response& response) const override {
    return WithNumbers(entries[0].tensor->dtype(), [](auto*) {}) &&
           WithOperation(response.reduce_op(), [](auto) {}) &&
           SharedMemoryFor(global_state_, entries[0]);
  }

  Status Execute(std::vector<TensorTableEntry>& entries,
                 const Response& response) override {
    WaitForData(entries);
    SharedMemory& memory = *SharedMemoryFor(global_state_, entries[0]);
    auto& first = entries[0];
    auto& timeline = global_state_->timeline;
    const int64_t count = NumElements(entries);
    const void* input = first.tensor->data();
    void* output = (void*)first.output->data();
    if (entries.size() > 1) {
      size_t bytes;
      timeline.ActivityStartAll(entries, MEMCPY_IN_FUSION_BUFFER);
      MemcpyInFusionBuffer(entries, input, output, bytes);
      timeline.ActivityEndAll(entries);
    }
    if (response.prescale_factor() != 1.0) {
      ScaleBuffer(response.prescale_factor(), entries, input, output, count);
      input = output;
    }
    timeline.ActivityStartAll(entries, "SHARED_MEMORY_ALLREDUCE");
    WithNumbers(first.tensor->dtype(), [&](auto* type) {
      using Numbers = decltype(type);
      WithOperation(response.reduce_op(), [&](auto operation) {
        memory.Reduce((const std::remove_pointer_t<Numbers>*)input,
                      (Numbers)output, count, operation);
      });
    });
    timeline.ActivityEndAll(entries);
    double scale = response.postscale_factor();
    if (response.reduce_op() == ReduceOp::AVERAGE) {
      scale /= global_state_->process_set_table.Get(0).controller->GetSize();
    }
    if (scale != 1.0) {
      ScaleBuffer(scale, entries, output, output, count);
    }
    if (entries.size() > 1) {
      timeline.ActivityStartAll(entries, MEMCPY_OUT_FUSION_BUFFER);
      MemcpyOutFusionBuffer(output, entries);
      timeline.ActivityEndAll(entries);
    }
    return Status::OK();
  }
};

class SharedMemoryReducescatter : public ReducescatterOp {
public:
  using ReducescatterOp::ReducescatterOp;

  bool Enabled(const ParameterManager& param_manager,
               const std::vector<TensorTableEntry>& entries,
               const Response& response) const override {
    return response.prescale_factor() == 1.0 &&
           WithNumbers(entries[0].tensor->dtype(), [](auto*) {}) &&
           SharedMemoryFor(global_state_, entries[0]);
  }

  // Always a sum: Horovod divides by postscale_factor for an average.
  Status Execute(std::vector<TensorTableEntry>& entries,
                 const Response& response) override {
    WaitForData(entries);
    SharedMemory& memory = *SharedMemoryFor(global_state_, entries[0]);
    auto& timeline = global_state_->timeline;
    const int size =
        global_state_->process_set_table.Get(0).controller->GetSize();
    timeline.ActivityStartAll(entries, "SHARED_MEMORY_REDUCESCATTER");
    for (auto& entry : entries) {
      std::vector<int64_t> begin = {0};
      for (int rank = 0; rank < size; ++rank) {
        begin.push_back(
            begin.back() +
            ComputeOutputShapeForRank(entry.tensor->shape(), rank, size)
                .num_elements());
      }
      void* output = (void*)entry.output->data();
      WithNumbers(entry.tensor->dtype(), [&](auto* type) {
        using Numbers = decltype(type);
        memory.ReduceScatter(
            (const std::remove_pointer_t<Numbers>*)entry.tensor->data(),
            (Numbers)output, begin, std::plus<>());
      });
      if (response.postscale_factor() != 1.0) {
        ScaleBuffer(response.postscale_factor(), entries, output, output,
                    entry.output->shape().num_elements());
      }
    }
    timeline.ActivityEndAll(entries);
    return Status::OK();
  }
};

class SharedMemoryAllgather : public AllgatherOp {
public:
  using AllgatherOp::AllgatherOp;

  bool Enabled(const ParameterManager& param_manager,
               const std::vector<TensorTableEntry>& entries,
               const Response& response) const override {
    return SharedMemoryFor(global_state_, entries[0]);
  }

  Status Execute(std::vector<TensorTableEntry>& entries,
                 const Response& response) override {
    WaitForData(entries);
    SharedMemory& memory = *SharedMemoryFor(global_state_, entries[0]);
    auto& timeline = global_state_->timeline;
    timeline.ActivityStartAll(entries, ALLOCATE_OUTPUT);
    int64_t** no_sizes = nullptr;
    Status status = AllocateOutput(entries, response, no_sizes);
    timeline.ActivityEndAll(entries);
    if (!status.ok()) {
      return status;
    }
    const int size =
        global_state_->process_set_table.Get(0).controller->GetSize();
    timeline.ActivityStartAll(entries, "SHARED_MEMORY_ALLGATHER");
    auto rows = response.tensor_sizes().begin(); // of each rank, for one entry after the other
    for (auto& entry : entries) {
      const int64_t all_rows = std::accumulate(rows, rows + size, int64_t(0));
      const int64_t row_bytes =
          all_rows == 0 ? 0 : (int64_t)entry.output->size() / all_rows;
      std::vector<int64_t> begin = {0};
      for (int rank = 0; rank < size; ++rank) {
        begin.push_back(begin.back() + *rows++ * row_bytes);
      }
      memory.Gather((const char*)entry.tensor->data(),
                    (char*)entry.output->data(), begin);
    }
    timeline.ActivityEndAll(entries);
    return Status::OK();
  }
};

class SharedMemoryBroadcast : public BroadcastOp {
public:
  using BroadcastOp::BroadcastOp;

  bool Enabled(const ParameterManager& param_manager,
               const std::vector<TensorTableEntry>& entries,
               const Response& response) const override {
    return SharedMemoryFor(global_state_, entries[0]);
  }

  Status Execute(std::vector<TensorTableEntry>& entries,
                 const Response& response) override {
    WaitForData(entries);
    auto& entry = entries[0]; // the only one
    SharedMemory& memory = *SharedMemoryFor(global_state_, entry);
    const bool is_root =
        global_state_->process_set_table.Get(0).controller->GetRank() ==
        entry.root_rank;
    const auto& tensor = is_root ? entry.tensor : entry.output;
    global_state_->timeline.ActivityStartAll(entries,
                                             "SHARED_MEMORY_BROADCAST");
    memory.Broadcast((char*)tensor->data(), (int64_t)tensor->size(),
                     entry.root_rank);
    global_state_->timeline.ActivityEndAll(entries);
    return Status::OK();
  }
};

} // namespace common
} // namespace horovod

#endif // HOROVOD_HAS_SHARED_MEMORY
#endif // HOROVOD_SHARED_MEMORY_OPERATIONS_H
