// Memory that the ranks of one host share: added to Horovod by hvdformer (see horovod_source.py).
//
// MPI and Gloo send messages even between two processes side by side, and poll or pass through the kernel for them, on the
// cores that compute. Here every rank copies what the others are to combine into memory that all see, combines its own
// share, and takes the others' from there; in between it sleeps. Horovod still decides what is sent, and when.
//
// The sum of a number is taken in the order of the ranks, so the same ranks give the same bits, whatever comes first.

#ifndef HOROVOD_SHARED_MEMORY_H
#define HOROVOD_SHARED_MEMORY_H

#if __linux__
#include <sys/syscall.h>
#endif

#if __linux__ && defined(SYS_memfd_create)
#define HOROVOD_HAS_SHARED_MEMORY 1

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <fcntl.h>
#include <linux/futex.h>
#include <memory>
#include <new>
#include <pthread.h>
#include <stdexcept>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <vector>

#include "common.h"
#include "utils/env_parser.h"

namespace horovod {
namespace common {

// Memory of all ranks of a host: two slots for each rank, and a place to meet.
class SharedMemory {
public:
  // Bytes of a slot: what is reduced at a time. Small enough that two slots of a
  // few ranks stay in the cache, large enough that ranks rarely have to meet.
  static constexpr size_t kSlot = 1 << 20;

  // Every rank calls it at the same point. Null on all of them where one cannot.
  template <typename Controller>
  static std::shared_ptr<SharedMemory> Open(Controller& controller) {
    std::shared_ptr<SharedMemory> memory(
        new SharedMemory(controller.GetRank(), controller.GetSize()));
    const bool wanted = GetBoolEnvOrDefault("HOROVOD_SHARED_MEMORY", true);
    Invitation invitation = {0, -1, {0, 0}};
    int fd = -1;
    if (memory->rank_ == 0 && wanted) {
      fd = memory->Create(invitation);
    }
    controller.Bcast(&invitation, sizeof(invitation), 0, Communicator::GLOBAL);
    if (memory->rank_ != 0 && wanted && invitation.fd >= 0) {
      memory->Join(invitation);
    }
    if (memory->base_ != nullptr) {
      pthread_mutex_lock(memory->alive(memory->rank_));
      memory->holder_ = pthread_self();
    }
    std::vector<long long> everywhere = {memory->base_ != nullptr};
    controller.CrossRankBitwiseAnd(everywhere, 1);
    if (fd >= 0) {
      close(fd);
    }
    return everywhere[0] ? memory : nullptr;
  }

  ~SharedMemory() {
    if (base_ != nullptr) {
      if (pthread_equal(holder_, pthread_self())) {
        pthread_mutex_unlock(alive(rank_)); // the kernel would not find it any more
      }
      munmap(base_, Bytes());
    }
  }

  // Fold `count` numbers of `input` over the ranks into `output`, which may be the same.
  template <typename T, typename Operation>
  void Reduce(const T* input, T* output, int64_t count, Operation operation) {
    const int64_t piece = kSlot / sizeof(T);
    for (int64_t done = 0; done < count; done += piece) {
      ReducePiece(input + done, output + done, std::min(piece, count - done),
                  operation);
    }
  }

  // Fold the numbers [begin[r], begin[r + 1]) of `input` over the ranks into the `output` of rank r.
  template <typename T, typename Operation>
  void ReduceScatter(const T* input, T* output,
                     const std::vector<int64_t>& begin, Operation operation) {
    const int64_t line = 64 / sizeof(T);
    const int64_t piece = kSlot / sizeof(T) / size_ / line * line;
    for (int64_t done = 0; done < Longest(begin); done += piece) {
      turn_ = 1 - turn_;
      for (int rank = 0; rank < size_; ++rank) {
        const T* from = input + begin[rank] + done;
        const int64_t n = Left(begin, rank, done, piece);
        if (rank != rank_) {
          std::copy(from, from + n, slot<T>(rank_) + rank * piece);
        }
      }
      Meet();
      Fold(input + begin[rank_] + done, rank_ * piece, output + done,
           Left(begin, rank_, done, piece), operation);
    }
  }

  // Bring the `input` of rank r into the bytes [begin[r], begin[r + 1]) of every `output`.
  void Gather(const char* input, char* output,
              const std::vector<int64_t>& begin) {
    const int64_t piece = kSlot;
    for (int64_t done = 0; done < Longest(begin); done += piece) {
      turn_ = 1 - turn_;
      const int64_t own = Left(begin, rank_, done, piece);
      std::copy(input + done, input + done + own, slot<char>(rank_));
      std::copy(input + done, input + done + own, output + begin[rank_] + done);
      Meet();
      for (int rank = 0; rank < size_; ++rank) {
        const char* from = slot<char>(rank);
        const int64_t n = Left(begin, rank, done, piece);
        if (rank != rank_) {
          std::copy(from, from + n, output + begin[rank] + done);
        }
      }
    }
  }

  // Bring the `data` of the root to every rank.
  void Broadcast(char* data, int64_t bytes, int root) {
    const int64_t piece = kSlot;
    for (int64_t done = 0; done < bytes; done += piece) {
      turn_ = 1 - turn_;
      const int64_t n = std::min(piece, bytes - done);
      if (rank_ == root) {
        std::copy(data + done, data + done + n, slot<char>(root));
      }
      Meet();
      if (rank_ != root) {
        std::copy(slot<char>(root), slot<char>(root) + n, data + done);
      }
    }
  }

  // Bit by bit over the ranks, of the first `count` words.
  void And(std::vector<long long>& words, int count) {
    Combine(words, count, true);
  }
  void Or(std::vector<long long>& words, int count) {
    Combine(words, count, false);
  }

private:
  struct Invitation {
    int64_t pid, fd;
    uint64_t token[2];
  };
  struct Header {
    uint64_t token[2];
    alignas(64) std::atomic<uint32_t> arrived;
    alignas(64) std::atomic<uint32_t> phase; // what sleeping ranks wait on
    alignas(64) std::atomic<uint32_t> broken;
  };
  struct alignas(64) Alive {
    pthread_mutex_t mutex;
  };

  SharedMemory(int rank, int size) : rank_(rank), size_(size) {}

  size_t SlotsOffset() const {
    const size_t page = 4096;
    return (sizeof(Header) + size_ * sizeof(Alive) + page - 1) / page * page;
  }
  size_t Bytes() const { return SlotsOffset() + 2 * kSlot * size_; }
  Header& header() { return *static_cast<Header*>(base_); }
  // Held by the thread of a rank as long as that lives: then the kernel lets go of it.
  pthread_mutex_t* alive(int rank) {
    return &reinterpret_cast<Alive*>(static_cast<char*>(base_) +
                                     sizeof(Header))[rank]
                .mutex;
  }
  template <typename T> T* slot(int rank) {
    return reinterpret_cast<T*>(static_cast<char*>(base_) + SlotsOffset() +
                                (2 * rank + turn_) * kSlot);
  }

  bool Map(int fd) {
    void* base =
        mmap(nullptr, Bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    base_ = base == MAP_FAILED ? nullptr : base;
    return base_ != nullptr;
  }

  // Memory without a name, that goes with the last rank: nothing is left behind, and /dev/shm may be small.
  int Create(Invitation& invitation) {
    int fd = (int)syscall(SYS_memfd_create, "horovod", 1u /* close on exec */);
    if (fd < 0 || ftruncate(fd, (off_t)Bytes()) != 0 || !Map(fd)) {
      return fd;
    }
    Header* header = new (base_) Header();
    if (syscall(SYS_getrandom, header->token, sizeof(header->token), 0) < 0) {
      return fd;
    }
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&attributes, PTHREAD_MUTEX_ROBUST);
    for (int rank = 0; rank < size_; ++rank) {
      pthread_mutex_init(alive(rank), &attributes);
    }
    pthread_mutexattr_destroy(&attributes);
    invitation = {getpid(), fd, {header->token[0], header->token[1]}};
    return fd;
  }

  void Join(const Invitation& invitation) {
    const std::string path = "/proc/" + std::to_string(invitation.pid) +
                             "/fd/" + std::to_string(invitation.fd);
    int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOCTTY);
    struct stat facts;
    // In a container of its own, the rank finds another process under that number, or none.
    if (fd >= 0 && fstat(fd, &facts) == 0 &&
        (size_t)facts.st_size == Bytes() && Map(fd) &&
        std::memcmp(header().token, invitation.token,
                    sizeof(invitation.token)) != 0) {
      munmap(base_, Bytes());
      base_ = nullptr;
    }
    if (fd >= 0) {
      close(fd);
    }
  }

  // Each rank adds up a share of the numbers: [Begin(r), Begin(r + 1)), whole cache lines.
  template <typename T> int64_t Begin(int rank, int64_t count) const {
    const int64_t line = 64 / sizeof(T);
    return rank == size_ ? count : count * rank / size_ / line * line;
  }

  // Of rank r's part, what is left after `done`, but at most a piece; 0 or more.
  static int64_t Left(const std::vector<int64_t>& begin, int rank,
                      int64_t done, int64_t piece) {
    return std::max<int64_t>(
        0, std::min(piece, begin[rank + 1] - begin[rank] - done));
  }

  int64_t Longest(const std::vector<int64_t>& begin) const {
    int64_t longest = 0;
    for (int rank = 0; rank < size_; ++rank) {
      longest = std::max(longest, begin[rank + 1] - begin[rank]);
    }
    return longest;
  }

  // The numbers of all ranks at one place, in the order of the ranks: this one's at `own`, the others' from their slots.
  template <typename T, typename Operation>
  void Fold(const T* own, int64_t place, T* result, int64_t count,
            Operation operation) {
    const T* first = rank_ == 0 ? own : slot<T>(0) + place;
    const T* second = rank_ == 1 ? own : slot<T>(1) + place;
    const int64_t block = 4096 / sizeof(T); // stays in the first cache
    for (int64_t i = 0; i < count; i += block) {
      const int64_t end = std::min(i + block, count);
      for (int64_t k = i; k < end; ++k) {
        result[k] = operation(first[k], second[k]);
      }
      for (int rank = 2; rank < size_; ++rank) {
        const T* next = rank == rank_ ? own : slot<T>(rank) + place;
        for (int64_t k = i; k < end; ++k) {
          result[k] = operation(result[k], next[k]);
        }
      }
    }
  }

  template <typename T, typename Operation>
  void ReducePiece(const T* input, T* output, int64_t count,
                   Operation operation) {
    // The other slot may still be read by a rank that is late; this one has been left by all of them since.
    turn_ = 1 - turn_;
    const int64_t begin = Begin<T>(rank_, count);
    const int64_t end = Begin<T>(rank_ + 1, count);
    T* own = slot<T>(rank_);
    std::copy(input, input + begin, own);
    std::copy(input + end, input + count, own + end);
    Meet();
    const int64_t block = 4096 / sizeof(T);
    for (int64_t i = begin; i < end; i += block) {
      const int64_t n = std::min(block, end - i);
      Fold(input + i, i, own + i, n, operation);
      std::copy(own + i, own + i + n, output + i);
    }
    Meet();
    for (int rank = 0; rank < size_; ++rank) {
      if (rank != rank_) {
        const T* results = slot<T>(rank);
        std::copy(results + Begin<T>(rank, count),
                  results + Begin<T>(rank + 1, count),
                  output + Begin<T>(rank, count));
      }
    }
  }

  void Combine(std::vector<long long>& words, int count, bool is_and) {
    const int piece = kSlot / sizeof(long long);
    for (int done = 0; done < count; done += piece) {
      CombinePiece(words.data() + done, std::min(piece, count - done), is_and);
    }
  }

  void CombinePiece(long long* words, int count, bool is_and) {
    turn_ = 1 - turn_;
    std::copy(words, words + count, slot<long long>(rank_));
    Meet();
    for (int rank = 0; rank < size_; ++rank) {
      const long long* next = slot<long long>(rank);
      for (int k = 0; rank != rank_ && k < count; ++k) {
        words[k] = is_and ? words[k] & next[k] : words[k] | next[k];
      }
    }
  }

  // Sleep until all ranks are here.
  void Meet() {
    Header& all = header();
    const uint32_t phase = all.phase.load();
    if (all.broken.load()) {
      Fail("a rank that shares memory with this one has left");
    }
    if (all.arrived.fetch_add(1) + 1 == (uint32_t)size_) {
      all.arrived.store(0);
      all.phase.store(phase + 1);
      Futex(FUTEX_WAKE, INT_MAX, nullptr);
      return;
    }
    while (all.phase.load() == phase) {
      const struct timespec moment = {0, 50 * 1000 * 1000};
      const bool is_late = Futex(FUTEX_WAIT, phase, &moment) != 0 &&
                           errno == ETIMEDOUT && all.phase.load() == phase;
      if (all.broken.load()) {
        Fail("a rank that shares memory with this one has left");
      }
      for (int rank = 0; is_late && rank < size_; ++rank) {
        if (rank != rank_ && pthread_mutex_trylock(alive(rank)) != EBUSY) {
          Fail("rank " + std::to_string(rank) +
               ", which shares memory with this one, has left");
        }
      }
    }
  }

  long Futex(int operation, uint32_t value, const struct timespec* timeout) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&header().phase),
                   operation, value, timeout, nullptr, 0);
  }

  void Fail(const std::string& why) {
    header().broken.store(1);
    Futex(FUTEX_WAKE, INT_MAX, nullptr);
    throw std::runtime_error("Shared memory: " + why);
  }

  const int rank_, size_;
  int turn_ = 0; // which of its two slots each rank uses
  void* base_ = nullptr;
  pthread_t holder_{}; // of alive(rank_)
};

} // namespace common
} // namespace horovod

#endif // __linux__
#endif // HOROVOD_SHARED_MEMORY_H
