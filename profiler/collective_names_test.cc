// Tests of the table of collective names.

#include "profiler/collective_names.h"

#include "gtest/gtest.h"

namespace pipeweaver::profiler {
namespace {

TEST(CollectiveNamesTest, TellsTheKind) {
  EXPECT_EQ(
      CollectiveKindOf("ncclKernel_AllReduce_RING_LL_Sum_float(ncclWorkElem)"),
      CollectiveKind::kAllReduce);
  EXPECT_EQ(
      CollectiveKindOf(
          "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgs)"),
      CollectiveKind::kReduceScatter);
  EXPECT_EQ(CollectiveKindOf("ncclDevKernel_AllGather_RING_LL"),
            CollectiveKind::kAllGather);
  EXPECT_EQ(CollectiveKindOf("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t"),
            CollectiveKind::kSendReceive);
  EXPECT_EQ(CollectiveKindOf("ncclKernel_Broadcast_RING_LL"),
            CollectiveKind::kBroadcast);
  EXPECT_EQ(CollectiveKindOf("ncclKernel_Reduce_RING_LL"),
            CollectiveKind::kReduce);
  EXPECT_EQ(CollectiveKindOf("ncclDevKernel_Generic(ncclDevKernelArgs)"),
            CollectiveKind::kOther);
  EXPECT_EQ(CollectiveKindOf("void vllm::cross_device_reduce_1stage<half, 8>"),
            CollectiveKind::kAllReduce);
  EXPECT_EQ(CollectiveKindOf(
                "void two_shot_all_reduce_kernel_inplace<c10::BFloat16>"),
            CollectiveKind::kAllReduce);
  EXPECT_EQ(CollectiveKindOf("multimem_one_shot_all_reduce_kernel"),
            CollectiveKind::kAllReduce);
  EXPECT_EQ(CollectiveKindOf("deep_ep::intranode::dispatch<8>"),
            CollectiveKind::kAllToAll);
}

TEST(CollectiveNamesTest, LeavesComputeKernelsAlone) {
  for (const char* name :
       {"void at::native::reduce_kernel<512, 1>", "splitKreduce_kernel",
        "volta_scudnn_128x64_relu_small_nn_v1", "cub::DeviceReduceByKeyKernel",
        "void at::native::_scatter_gather_elementwise_kernel<128, 4>", ""}) {
    EXPECT_EQ(CollectiveKindOf(name), CollectiveKind::kNone) << name;
  }
}

TEST(CollectiveNamesTest, EveryKindHasAName) {
  EXPECT_EQ(CollectiveKindName(CollectiveKind::kSendReceive), "send_recv");
  EXPECT_EQ(CollectiveKindName(CollectiveKind::kNone), "none");
}

}  // namespace
}  // namespace pipeweaver::profiler
