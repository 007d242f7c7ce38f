// The kernels of rows.h for float32 tables.

#include "rows.h"

SLGR_ROW_KERNELS(float, float32)
