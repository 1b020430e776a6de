"""Every module of the zoo: importing this one fills the registry."""

from __future__ import annotations

import zoo_calls
import zoo_calls2
import zoo_calls3
import zoo_images
import zoo_images2
import zoo_images3
import zoo_images4
import zoo_images5
import zoo_images6
import zoo_images7
import zoo_modular
import zoo_videos
import zoo_videos2
import zoo_videos3
import zoo_videos4
import zoo_videos_audio
from zoo import ZOO

MODULES = (
    *(zoo_images, zoo_images2, zoo_images3, zoo_images4, zoo_images5),
    *(zoo_images6, zoo_images7, zoo_modular),
    *(zoo_calls, zoo_calls2, zoo_calls3),
    *(zoo_videos, zoo_videos2, zoo_videos3, zoo_videos4, zoo_videos_audio),
)

__all__ = ["MODULES", "ZOO"]
