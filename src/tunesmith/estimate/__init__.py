"""What a run will take, before it runs."""

from tunesmith.estimate.forecast import Forecast, forecast

__all__ = ["Forecast", "forecast"]
