"""What a run will take, before it runs."""

from tunesmith.train.plan.forecast import Forecast, forecast

__all__ = ["Forecast", "forecast"]
