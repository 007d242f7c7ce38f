// The kernels of rows.h for packed bfloat16 tables (`embedding_table.RowFormat`).

#include "rows.h"

SLGR_ROW_KERNELS(uint16_t, bfloat16)
