"""vlaflow's policies in LeRobot, which imports this package when it starts and so learns their names.

lerobot-train --policy.type=vlaflow_asyncvla --policy.recipe=asyncvla.demo ...
"""

from lerobot_policy_vlaflow import configuration_vlaflow

__all__ = ["configuration_vlaflow"]
