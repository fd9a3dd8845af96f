"""Horovod's source: which one it is, and what is changed in it before it is built."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from hvdformer.errors import RunError

HOROVOD_VERSION = "0.28.1"
SOURCE_SHA256 = (
    "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"  # of PyPI's horovod-0.28.1.tar.gz
)
LOCAL_VERSION = (
    "hvdformer.5"  # 0.28.1+hvdformer.5 says that it is not as it was published; raise it with EDITS
)
# The files of these names beside this one go there.
ADDED = ("horovod/common/shared_memory.h", "horovod/common/ops/shared_memory_operations.h")


def sleeps_when_idle() -> bool:
    """Whether the Horovod that is installed knows HOROVOD_IDLE_CYCLE_TIME: it was built from what `unpack` makes."""
    import importlib.metadata  # 30 ms, which `hvdformer --help` does not need

    try:
        return "+hvdformer." in importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        return False


@dataclass(frozen=True)
class Edit:
    """A change of a file, by regular expression."""

    file: str
    pattern: str
    replacement: str
    count: int = 1  # how often the pattern is there


EDITS = (
    # Gloo's allgatherv and alltoallv queue their data before they tell the peer, over the same socket, that they are ready
    # for its data. Between two hosts one direction then waits for the other. As in Gloo's allreduce, receiving comes first.
    Edit(
        "third_party/gloo/gloo/allgatherv.cc",
        r"( *out->send\([^;]*;\n)( *out->recv\([^;]*;\n)",
        r"\2\1",
        count=2,
    ),
    Edit("third_party/gloo/gloo/alltoallv.cc", r"( *in->send\([^;]*;\n)( *out->recv\([^;]*;\n)", r"\2\1"),
    # With one peer after the other: in the published order some peers get the data before the word.
    Edit(
        "third_party/gloo/gloo/alltoallv.cc",
        r"recvRank = \(myRank \+ worldSize - i\) % worldSize;",
        "recvRank = sendRank;",
    ),
    # Gloo's thread asks for events again at once while another thread writes to the same socket, and takes the core from it.
    Edit(
        "third_party/gloo/gloo/transport/tcp/pair.cc",
        r"(std::try_to_lock\);\n  if \(!lock\) \{\n)(    return;)",
        r"\1    usleep(50);\n\2",
    ),
    # Horovod's thread wakes up every HOROVOD_CYCLE_TIME to ask the other ranks what is ready, also while nothing can be, and
    # takes time and cache from the rank that computes. With HOROVOD_IDLE_CYCLE_TIME, in ms, and nothing to reduce on this
    # rank, it sleeps that long, or until there is something. Without it nothing changes.
    Edit(
        "horovod/common/operations.cc",
        r"( *std::this_thread::sleep_for\(sleep_duration\);\n  \}\n)(  state\.last_cycle_start = )",
        r"""\1  static const double idle_cycle_ms =
      GetDoubleEnvOrDefault("HOROVOD_IDLE_CYCLE_TIME", 0.0);
  if (idle_cycle_ms > 0 && !state.shut_down &&
      state.process_set_table.Ids().size() == 1) {
    // From the end of a cycle, where the ranks were together: then none of them waits in the next one for another.
    state.process_set_table.Get(0).tensor_queue.WaitForTensor(
        start_time + std::chrono::microseconds(long(idle_cycle_ms * 1000.)));
  }
\2""",
    ),
    Edit(
        "horovod/common/tensor_queue.h",
        r"#include <mutex>\n",
        "#include <chrono>\n#include <condition_variable>\n#include <mutex>\n",
    ),
    Edit(
        "horovod/common/tensor_queue.h",
        r"  void RemoveJoinTensor\(\);\n",
        r"""\g<0>
  // Sleep until a tensor is in the table, or until a point in time.
  void WaitForTensor(std::chrono::steady_clock::time_point until) {
    std::unique_lock<std::mutex> lock(mutex_);
    added_.wait_until(lock, until, [this] { return !tensor_table_.empty(); });
  }

  void Open() {
    TensorTable ended;  // destroyed after the lock is given back
    std::lock_guard<std::mutex> guard(mutex_);
    is_closed_ = false;
    ended.swap(ended_);
  }
""",
    ),
    Edit(
        "horovod/common/tensor_queue.h",
        r"  mutable std::mutex mutex_;\n",
        r"\g<0>  std::condition_variable added_;\n  bool is_closed_ = false;\n  TensorTable ended_;\n",
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        r" *tensor_table_\.emplace\((e|entries\[i\])\.tensor_name, std::move\(\1\)\);\n",
        r"\g<0>    added_.notify_one();\n",
        count=2,
    ),
    # A tensor that came while the thread was ending, for contact to a rank was lost, was left in the table, and who waited for
    # it waited for ever: from the moment that the table is cleared it takes no more, until Horovod is started again.
    Edit(
        "horovod/common/tensor_queue.cc",
        r"(Status TensorQueue::AddToTensorQueue(?:Multi)?\([^{]*\{\n *std::lock_guard<std::mutex> guard\(mutex_\);\n)",
        r"\1  if (is_closed_) {\n    return SHUT_DOWN_ERROR;\n  }\n",
        count=2,
    ),
    Edit(
        "horovod/common/tensor_queue.cc",
        r"void TensorQueue::FinalizeTensorQueue\([^{]*\{\n *std::lock_guard<std::mutex> guard\(mutex_\);\n",
        r"\g<0>  is_closed_ = true;\n",
    ),
    # In today's PyTorch (2.13: c10/util/intrusive_ptr.h, PyObject preservation) who lets go of a tensor that Python knows
    # needs Python's lock. The thread that cleared the table held locks of Horovod's own, and the one with Python's lock waited
    # for these to hand over a tensor: for ever. So the tensors stay until Horovod is started again.
    Edit(
        "horovod/common/tensor_queue.cc",
        r"  tensor_table_\.clear\(\);\n",
        "  tensor_table_.swap(ended_);\n",
    ),
    Edit(
        "horovod/common/operations.cc",
        r"  state\.initialization_done = true;\n",
        r"  state.process_set_table.Get(0).tensor_queue.Open();\n\g<0>",
    ),
    # The rank that first has a tensor to reduce waits in MPI's negotiation until the last one has it too: MPI polls meanwhile, on
    # the core that computes. Every negotiation starts with one of these two, so it is enough that they sleep.
    Edit(
        "horovod/common/mpi/mpi_controller.cc",
        r"// MPIController\nvoid MPIController::DoInitialization",
        """\
// Wait for an operation and leave the core to who computes: about an eighth
// longer than it takes, up to 250 us and the timer's slack.
static int Finish(MPI_Request request) {
  const auto polls = std::chrono::microseconds(50);
  const std::chrono::nanoseconds longest = std::chrono::microseconds(250);
  const auto start = std::chrono::steady_clock::now();
  while (true) {
    int done = 0;
    int ret_code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
    if (ret_code != MPI_SUCCESS || done) {
      return ret_code;
    }
    std::chrono::nanoseconds waited = std::chrono::steady_clock::now() - start;
    if (waited > polls) {
      std::this_thread::sleep_for(std::min(waited / 8, longest));
    }
  }
}

\\g<0>""",
    ),
    Edit(
        "horovod/common/mpi/mpi_controller.cc",
        r"int ret_code = MPI_Allreduce\((MPI_IN_PLACE, bitvector\.data\(\)[^;]*)\);\n",
        """\
MPI_Request request;
  int ret_code = MPI_Iallreduce(\\1, &request);
  if (ret_code == MPI_SUCCESS) {
    ret_code = Finish(request);
  }
""",
        count=2,
    ),
    Edit(
        "horovod/common/mpi/mpi_controller.cc",
        r"#include <numeric>\n",
        "#include <algorithm>\n#include <chrono>\n#include <numeric>\n#include <thread>\n",
    ),
    # Ranks of one host add up and hand over tensors in memory that they share, and agree there on what is next: no
    # messages, no polling.
    Edit(
        "horovod/common/controller.h",
        r'#include "response_cache\.h"\n',
        r'\g<0>#include "shared_memory.h"\n',
    ),
    Edit(
        "horovod/common/controller.h",
        r"  virtual ~Controller\(\) = default;\n",
        """\\g<0>
#if HOROVOD_HAS_SHARED_MEMORY
  // Where the ranks share memory, from the first collective in it.
  std::shared_ptr<SharedMemory> shared_memory;
  bool has_asked_for_shared_memory = false;
#endif
""",
    ),
    Edit(
        "horovod/common/response_cache.cc",
        r" *controller->CrossRankBitwise(And|Or)\(bitvector_, (count|fullcount)\);\n",
        """\
#if HOROVOD_HAS_SHARED_MEMORY
  if (controller->shared_memory) {
    controller->shared_memory->\\1(bitvector_, \\2);
  } else
#endif
  \\g<0>""",
        count=2,
    ),
    Edit(
        "horovod/common/operations.cc",
        r'#include "ops/operation_manager\.h"\n',
        r'\g<0>#include "ops/shared_memory_operations.h"\n',
    ),
    Edit(
        "horovod/common/operations.cc",
        r"#if HAVE_GLOO\n(?=  if \(global_gloo_context\.IsEnabled\(\)\) \{\n    allreduce_ops)",
        """\
#if HOROVOD_HAS_SHARED_MEMORY
  allreduce_ops.push_back(std::make_shared<SharedMemoryAllreduce>(&state));
  reducescatter_ops.push_back(
      std::make_shared<SharedMemoryReducescatter>(&state));
  allgather_ops.push_back(std::make_shared<SharedMemoryAllgather>(&state));
  broadcast_ops.push_back(std::make_shared<SharedMemoryBroadcast>(&state));
#endif

\\g<0>""",
    ),
    # horovodrun ends with 1, whatever the ranks' exit code is, and with a traceback of its own behind their message.
    Edit(
        "horovod/runner/launch.py",
        r"(?m)^    _run\(args\)$",
        """\
    try:
        _run(args)
    except RuntimeError as error:
        import re

        print('horovodrun: {}'.format(str(error).strip()), file=sys.stderr)
        found = re.search('exit code:? (-?[0-9]+)', str(error), re.IGNORECASE)
        code = int(found.group(1)) if found else 1
        sys.exit(code if code >= 0 else 128 - code)""",
    ),
)


def unpack(archive: Path) -> Path:
    """Unpack the source beside its archive, which is the one of `SOURCE_SHA256`; change it, and return its folder.

    Raises:
        RunError: a place to change is not there as often as it should be.
    """
    shutil.unpack_archive(archive, archive.parent)
    source = archive.with_name(archive.name.removesuffix(".tar.gz"))
    for edit in EDITS:
        file = source / edit.file
        text, found = re.subn(edit.pattern, edit.replacement, file.read_text(encoding="utf-8"))
        if found != edit.count:
            raise RunError(
                f"{edit.file} of Horovod is not as expected: found {edit.pattern!r} {found} times, expected {edit.count}"
            )
        file.write_text(text, encoding="utf-8")
    for target in ADDED:
        shutil.copy(Path(__file__).with_name(Path(target).name), source / target)
    return source
