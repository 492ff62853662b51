"""What a training run tells: lines on the screen, metrics.csv, curves."""

from extras import files
from extras.files import UserError
from extras.pictures import draw_curves

COLUMNS = ("stage", "step", "lr", "grad_norm", "pixel_loss", "commitment", "dynamics_loss",
           "codes_used", "perplexity", "val_wrong_pixels", "val_copy_wrong_pixels",
           "val_codes_used", "val_perplexity", "val_accuracy", "val_dynamics_loss",
           "val_action_ratio")


class RunLog:
    """The log of the run in folder `out`. rows: a dict of some of COLUMNS for each line."""

    def __init__(self, out):
        self.out, self.rows, self.told = out, [], set()

    def add(self, row, total, batch, seconds_per_step):
        """One line on the screen; metrics.csv and the curves written anew."""
        self.rows.append(row)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.items()
                            if name not in ("stage", "step", "lr"))
        print(f"{row['stage']} {row['step']}/{total}  {numbers}"
              f"  | {batch / seconds_per_step:.1f} sequences/s"
              f"  ETA {seconds_per_step * (total - row['step']) / 60:.1f} min", flush=True)
        self.unless_held(self.write_metrics)
        self.unless_held(draw_curves, self.rows, self.out / "losses.png")

    def write_metrics(self):
        lines = [",".join(COLUMNS)] + [
            ",".join(str(row.get(name, "")) for name in COLUMNS) for row in self.rows]
        with files.written_whole(self.out / "metrics.csv") as file:
            file.write("\n".join(lines + [""]).encode())

    def unless_held(self, write, *args):
        """Write a log or a picture. If it cannot be written, as when a spreadsheet holds it, say so
        once and go on: it is tried again the next time, and only a checkpoint may stop a run."""
        try:
            write(*args)
        except (UserError, OSError) as error:
            if str(error) not in self.told:
                files.warn(f"{error}; training goes on")
            self.told.add(str(error))
