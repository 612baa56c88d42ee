// The C ABI of cuda/mailbox.cpp in libelang_ops.so. elang._C finds it at run time: one library, one CUDA runtime.
#pragma once

#include <cstdint>

#include "../rows.h"

struct elang_mailbox;

using elang_mailbox_new_t = const char*(int device, elang_mailbox** out);
using elang_mailbox_delete_t = void(elang_mailbox* box);
// How many rows are routed and how long the longest is (see routed_extent), once torch's current stream has computed it.
// A mask without columns asks for the count alone.
using elang_mailbox_read_t = const char*(
    elang_mailbox* box, const elang::Mask* mask, const elang::Order* order, double seconds, int32_t extent[2]);
