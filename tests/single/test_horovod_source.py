"""What is changed in Horovod's source before it is built."""

import shutil
import subprocess
import sys

import pytest

from hvdformer.errors import RunError
from hvdformer.horovod_source import unpack

GLOO = "third_party/gloo/gloo"
RUNNER = """import sys


def _run(args):
    if args:
        raise args[0]


def run_commandline():
    args = parse_args()

    _run(args)


if __name__ == '__main__':
    run_commandline()
"""
PUBLISHED = {
    "horovod/runner/launch.py": RUNNER,
    f"{GLOO}/allgatherv.cc": """if (i == 0) {
      out->send(next, slot, a[i], b[i]);
      out->recv(last, slot, c[i], d[i]);
      continue;
    }
    out->send(next, slot, a[i], b[i]);
    out->recv(last, slot, c[i], d[i]);
""",
    f"{GLOO}/alltoallv.cc": """int sendRank = (myRank + i) % worldSize;
    int recvRank = (myRank + worldSize - i) % worldSize;
    in->send(
        sendRank, slot, a[sendRank]);
    out->recv(
        recvRank, slot, b[recvRank]);
""",
    "horovod/common/operations.cc": """#include "ops/operation_manager.h"
#if HAVE_NCCL
    allreduce_ops.push_back(NCCL);
#endif

#if HAVE_GLOO
  if (global_gloo_context.IsEnabled()) {
    allreduce_ops.push_back(GLOO);
  }
#endif

  auto start_time = std::chrono::steady_clock::now();
  if (sleep_duration > std::chrono::steady_clock::duration::zero()) {
    std::this_thread::sleep_for(sleep_duration);
  }
  state.last_cycle_start = std::chrono::steady_clock::now();
  state.initialization_done = true;
""",
    "horovod/common/ops/collective_operations.h": "",
    "horovod/common/controller.h": """#include "response_cache.h"
class Controller {
  virtual ~Controller() = default;
};
""",
    "horovod/common/response_cache.cc": """  controller->CrossRankBitwiseAnd(bitvector_, fullcount);
  if (invalid_in_queue_) {
    controller->CrossRankBitwiseOr(bitvector_, count);
  }
""",
    "horovod/common/tensor_queue.h": """#include <mutex>
class TensorQueue {
public:
  void RemoveJoinTensor();

protected:
  mutable std::mutex mutex_;
};
""",
    "horovod/common/tensor_queue.cc": """Status TensorQueue::AddToTensorQueue(TensorTableEntry& e) {
  std::lock_guard<std::mutex> guard(mutex_);
  tensor_table_.emplace(e.tensor_name, std::move(e));
}
Status TensorQueue::AddToTensorQueueMulti(std::vector<TensorTableEntry>& entries,
                                          std::vector<Request>& messages) {
  std::lock_guard<std::mutex> guard(mutex_);

    tensor_table_.emplace(entries[i].tensor_name, std::move(entries[i]));
}
void TensorQueue::FinalizeTensorQueue(const Status& status) {
  std::lock_guard<std::mutex> guard(mutex_);
  tensor_table_.clear();
}
""",
    "horovod/common/mpi/mpi_controller.cc": """#include <numeric>
// MPIController
void MPIController::DoInitialization() {}

void MPIController::CrossRankBitwiseAnd(std::vector<long long>& bitvector,
                                        int count) {
  int ret_code = MPI_Allreduce(MPI_IN_PLACE, bitvector.data(), count,
                               MPI_LONG_LONG_INT, MPI_BAND, mpi_ctx_.mpi_comm);
}
void MPIController::CrossRankBitwiseOr(std::vector<long long>& bitvector,
                                       int count) {
  int ret_code = MPI_Allreduce(MPI_IN_PLACE, bitvector.data(), count,
                               MPI_LONG_LONG_INT, MPI_BOR, mpi_ctx_.mpi_comm);
}
""",
    f"{GLOO}/transport/tcp/pair.cc": """  std::unique_lock<std::mutex> lock(m_, std::try_to_lock);
  if (!lock) {
    return;
  }
""",
}
RECEIVES_FIRST = {
    f"{GLOO}/allgatherv.cc": """if (i == 0) {
      out->recv(last, slot, c[i], d[i]);
      out->send(next, slot, a[i], b[i]);
      continue;
    }
    out->recv(last, slot, c[i], d[i]);
    out->send(next, slot, a[i], b[i]);
""",
    f"{GLOO}/alltoallv.cc": """int sendRank = (myRank + i) % worldSize;
    int recvRank = sendRank;
    out->recv(
        recvRank, slot, b[recvRank]);
    in->send(
        sendRank, slot, a[sendRank]);
""",
}


def archive(folder, files):
    """An archive of a source with these files in it."""
    source = folder / "horovod-0.28.1"
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
    shutil.make_archive(str(source), "gztar", folder, source.name)
    shutil.rmtree(source)
    return folder / "horovod-0.28.1.tar.gz"


def test_gloo_is_made_to_receive_before_it_sends(tmp_path):
    source = unpack(archive(tmp_path, PUBLISHED))
    assert source == tmp_path / "horovod-0.28.1"
    assert {name: (source / name).read_text() for name in RECEIVES_FIRST} == RECEIVES_FIRST


def test_horovods_thread_is_made_to_sleep_until_there_is_a_tensor(tmp_path):
    common = unpack(archive(tmp_path, PUBLISHED)) / "horovod" / "common"
    waits = (common / "operations.cc").read_text()
    published = waits.index("sleep_for"), waits.index("state.last_cycle_start =")
    assert published[0] < waits.index("WaitForTensor(") < published[1]
    told = (common / "tensor_queue.cc").read_text().splitlines()
    notifies = [number for number, line in enumerate(told) if "added_.notify_one();" in line]
    assert ["tensor_table_.emplace" in told[number - 1] for number in notifies] == [True, True]
    header = (common / "tensor_queue.h").read_text()
    assert header.index("void WaitForTensor(") < header.index("protected:") < header.index("added_;")
    assert "#include <condition_variable>" in header


def test_horovods_thread_is_made_to_sleep_in_mpis_negotiation(tmp_path):
    controller = unpack(archive(tmp_path, PUBLISHED)) / "horovod" / "common" / "mpi" / "mpi_controller.cc"
    text = controller.read_text()
    assert text.index("#include <thread>") < text.index("static int Finish(") < text.index("// MPIController")
    assert "MPI_Allreduce" not in text
    for operation in ("MPI_BAND", "MPI_BOR"):
        asks = f"MPI_LONG_LONG_INT, {operation}, mpi_ctx_.mpi_comm, &request);\n"
        assert f"{asks}  if (ret_code == MPI_SUCCESS) {{\n    ret_code = Finish(request);" in text


def test_memory_that_ranks_share_is_asked_before_gloo_and_mpi(tmp_path):
    common = unpack(archive(tmp_path, PUBLISHED)) / "horovod" / "common"
    text = (common / "operations.cc").read_text()
    places = [
        text.index(words) for words in ("push_back(NCCL", "SharedMemoryAllreduce>(&state)", "push_back(GLOO")
    ]
    assert places == sorted(places)
    assert '#include "ops/shared_memory_operations.h"' in text
    assert "class SharedMemory {" in (common / "shared_memory.h").read_text()
    operations = (common / "ops" / "shared_memory_operations.h").read_text()
    for name in ("Allreduce", "Reducescatter", "Allgather", "Broadcast"):
        assert f"class SharedMemory{name} :" in operations
        assert f"make_shared<SharedMemory{name}>(&state)" in text
    agreed = (common / "response_cache.cc").read_text()
    for words in ("And(bitvector_, fullcount);", "Or(bitvector_, count);"):
        assert agreed.index(f"shared_memory->{words}") < agreed.index(f"CrossRankBitwise{words}")


def test_a_table_that_was_cleared_takes_no_tensor_until_horovod_starts_again(tmp_path):
    common = unpack(archive(tmp_path, PUBLISHED)) / "horovod" / "common"
    table = (common / "tensor_queue.cc").read_text()
    refused = "guard(mutex_);\n  if (is_closed_) {\n    return SHUT_DOWN_ERROR;\n  }\n"
    assert table.count(refused) == 2 and table.count("guard(mutex_);\n  is_closed_ = true;\n") == 1
    assert "tensor_table_.swap(ended_);" in table and ".clear()" not in table
    header = (common / "tensor_queue.h").read_text()
    assert (
        header.index("TensorTable ended;")
        < header.index("ended.swap(ended_);")
        < header.index("TensorTable ended_;")
    )
    assert (
        "tensor_queue.Open();\n  state.initialization_done = true;" in (common / "operations.cc").read_text()
    )


def test_gloos_thread_does_not_ask_again_at_once(tmp_path):
    pair = unpack(archive(tmp_path, PUBLISHED)) / GLOO / "transport" / "tcp" / "pair.cc"
    assert "  if (!lock) {\n    usleep(50);\n    return;\n" in pair.read_text()


@pytest.mark.parametrize(
    "error,code,says",
    [
        ("RuntimeError('mpirun failed with exit code 2')", 2, "horovodrun: mpirun failed with exit code 2\n"),
        ("RuntimeError('The first was:\\nProcess name: 0\\nExit code: 130\\n')", 130, "Exit code: 130\n"),
        ("RuntimeError('Exit code: -9')", 137, "horovodrun: Exit code: -9\n"),
        ("RuntimeError('no such host')", 1, "horovodrun: no such host\n"),
        ("ValueError('a bug')", 1, "Traceback"),
        ("", 0, ""),
    ],
)
def test_horovodrun_is_made_to_end_as_its_ranks_did(error, code, says, tmp_path):
    source = unpack(archive(tmp_path, PUBLISHED))
    runner = source / "horovod" / "runner" / "launch.py"
    runner.write_text(f"{runner.read_text()}".replace("parse_args()", f"[{error}]"))
    done = subprocess.run([sys.executable, runner], capture_output=True, text=True, check=False)
    assert done.returncode == code and says in done.stderr
    assert ("Traceback" in done.stderr) == (says == "Traceback")


def test_a_source_that_is_not_the_known_one_is_not_built(tmp_path):
    changed = archive(tmp_path, PUBLISHED | {"horovod/runner/launch.py": "def run_commandline(): pass\n"})
    with pytest.raises(RunError, match=r"horovod/runner/launch\.py of Horovod is not as expected"):
        unpack(changed)
