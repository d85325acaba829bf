/* Opens a volume together with shadow verify, which the volume itself does not know. */
#include "shadow/shadow.h"
#include "volume/volume.h"

int glide_volume_open(glide_engine *engine, const struct glide_volume_config *config, glide_volume **out,
                      struct glide_recovery *recovery)
{
    return volume_open(engine, config, shadow_open, out, recovery);
}
