"""The demonstration: pinned public assets, data splits and one run that anyone can repeat."""

import logging

# Keep back what these say of themselves when transformers imports them: the demo uses none of it.
for _name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
