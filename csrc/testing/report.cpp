// Texts of the messages that report misuse.
#include <sstream>
#include <string_view>

#include "testing/scheduler_state.h"

namespace panfpn::cuda_on_host {

const char* name_of(WarpOp op) {
  constexpr const char* kNames[] = {"__syncwarp",      "__ballot_sync",   "__shfl_sync",
                                    "__shfl_up_sync",  "__shfl_xor_sync", "__reduce_add_sync",
                                    "__reduce_or_sync"};
  return kNames[static_cast<size_t>(op)];
}

std::string text(uint3 v) {
  std::ostringstream out;
  out << "(" << v.x << ", " << v.y << ", " << v.z << ")";
  return out.str();
}

std::string text(const Location& where) {
  const std::string_view path = where.file_name();
  std::ostringstream out;
  out << path.substr(path.rfind('/') + 1) << ":" << where.line();
  return out.str();
}

std::string hex(uint32_t mask) {
  std::ostringstream out;
  out << "0x" << std::hex << mask;
  return out.str();
}

std::string deadlock_report(const char* kernel, uint3 block, const std::vector<Thread>& threads) {
  std::ostringstream out;
  out << "kernel " << kernel << ": deadlock, no thread can run:";
  // One line for each place where threads wait, with the first thread that waits there.
  struct Place {
    const Thread* first;
    size_t count;
  };
  std::vector<Place> places;
  for (const Thread& thread : threads) {
    if (thread.finished) continue;
    bool known = false;
    for (Place& place : places) {
      if (place.first->wait == thread.wait && place.first->group == thread.group &&
          place.first->where.line() == thread.where.line()) {
        ++place.count;
        known = true;
        break;
      }
    }
    if (!known) places.push_back({&thread, 1});
  }
  constexpr size_t kShown = 8;
  for (size_t i = 0; i < places.size() && i < kShown; ++i) {
    const Thread& thread = *places[i].first;
    out << "\n  block " << text(block) << ": " << places[i].count << " threads, the first is "
        << text(thread.index) << ", wait at " << text(thread.where) << " in ";
    if (thread.wait == Wait::warp) {
      out << name_of(thread.group->op) << " with mask " << hex(thread.group->mask) << " for lanes "
          << hex(thread.group->mask & ~thread.group->arrived);
    } else {
      out << "__syncthreads";
    }
  }
  if (places.size() > kShown) out << "\n  and at " << places.size() - kShown << " other places";
  return out.str();
}

}  // namespace panfpn::cuda_on_host
