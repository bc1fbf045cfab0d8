#include "kd_patch.h"
