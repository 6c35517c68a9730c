#include "bind.h"
namespace tersor { void bind_other_rows(nb::module_&) {} }
