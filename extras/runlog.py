"""What a training run tells: lines on the screen, metrics.csv, curves, and what has gone wrong."""

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


def troubles(result, stage, progress):
    """Sentences about what has gone wrong in a validation result, usually none. progress: the share
    of the stage that is done. Early on, all of them are normal."""
    if stage == 0:
        if result["codes_used"] <= 4:
            yield (f"THE CODEBOOK HAS COLLAPSED: {result['codes_used']} codes in use. Give the"
                   " encoder longer before the codebook starts: --tok_unquantized 300")
        return
    if result["perplexity"] < 1.5:
        yield (f"THE ACTIONS HAVE COLLAPSED: perplexity {result['perplexity']:.2f}, so nearly all"
               " steps get one code. If it lasts, let the LAM learn longer before its codebook"
               " starts (--lam_steps, --lam_unquantized), or lower --lr")
    if result["wrong_pixels"] > 0.95 * result["copy_wrong_pixels"]:
        yield (f"THE LAM IS NO BETTER THAN COPYING: {result['wrong_pixels']:.1f} wrong pixels"
               f" against {result['copy_wrong_pixels']:.1f}. If it lasts, train longer, raise --lr,"
               " or bring more video: a minute of it is learned by heart")
    if progress >= 0.1 and result["action_ratio"] < 1.1:
        yield (f"THE BUTTONS DO NOTHING: with another clip's actions the dynamics loses"
               f" {result['action_ratio']:.2f} times as much. If it lasts, the codes name no"
               " actions (more --lam_steps), or too little moves")
