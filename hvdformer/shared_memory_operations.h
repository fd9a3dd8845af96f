// Allreduce in memory that the ranks of one host share: added to Horovod by hvdformer (see shared_memory.h).

#ifndef HOROVOD_SHARED_MEMORY_OPERATIONS_H
#define HOROVOD_SHARED_MEMORY_OPERATIONS_H

#include "../shared_memory.h"
#include "collective_operations.h"

#if HOROVOD_HAS_SHARED_MEMORY

namespace horovod {
namespace common {

class SharedMemoryAllreduce : public AllreduceOp {
public:
  explicit SharedMemoryAllreduce(HorovodGlobalState* global_state)
      : AllreduceOp(global_state) {}

  // Whatever this depends on is the same on every rank.
  bool Enabled(const ParameterManager& param_manager,
               const std::vector<TensorTableEntry>& entries,
               const Response& response) const override {
    const auto& first = entries[0];
    if (first.device != CPU_DEVICE_ID || first.process_set_id != 0 ||
        (response.reduce_op() != ReduceOp::SUM &&
         response.reduce_op() != ReduceOp::AVERAGE)) {
      return false;
    }
    switch (first.tensor->dtype()) {
    case HOROVOD_INT32:
    case HOROVOD_INT64:
    case HOROVOD_FLOAT32:
    case HOROVOD_FLOAT64:
      break;
    default:
      return false;
    }
    Controller& controller =
        *global_state_->process_set_table.Get(0).controller;
    if (!is_asked_) {
      is_asked_ = true;
      if (controller.GetSize() > 1 &&
          controller.GetLocalSize() == controller.GetSize()) {
        controller.shared_memory = SharedMemory::Open(controller);
      }
    }
    return controller.shared_memory != nullptr;
  }

  Status Execute(std::vector<TensorTableEntry>& entries,
                 const Response& response) override {
    WaitForData(entries);
    auto& memory =
        *global_state_->process_set_table.Get(0).controller->shared_memory;
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
    switch (first.tensor->dtype()) {
    case HOROVOD_INT32:
      memory.Sum((const int32_t*)input, (int32_t*)output, count);
      break;
    case HOROVOD_INT64:
      memory.Sum((const int64_t*)input, (int64_t*)output, count);
      break;
    case HOROVOD_FLOAT32:
      memory.Sum((const float*)input, (float*)output, count);
      break;
    default:
      memory.Sum((const double*)input, (double*)output, count);
    }
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

private:
  mutable bool is_asked_ = false;
};

} // namespace common
} // namespace horovod

#endif // HOROVOD_HAS_SHARED_MEMORY
#endif // HOROVOD_SHARED_MEMORY_OPERATIONS_H
