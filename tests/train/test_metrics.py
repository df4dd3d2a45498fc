"""The logger leaves nothing behind until there is something to log."""

from omegaconf import OmegaConf

from phi3_plugin.train import DiskLogger


def test_nothing_is_written_before_the_first_step(tmp_path):
    logger = DiskLogger(tmp_path / "out")
    logger.log_config(OmegaConf.create({"output_dir": str(tmp_path / "out")}))
    logger.close()
    assert list(tmp_path.iterdir()) == []


def test_steps_and_settings_are_written(tmp_path):
    logger = DiskLogger(tmp_path)
    logger.log_config(OmegaConf.create({"output_dir": str(tmp_path), "seed": 3}))
    logger.log_dict({"loss": 1.5, "lr": 0.1}, step=1)
    logger.log("loss", 1.25, step=2)
    logger.close()
    (file,) = (tmp_path / "logs").iterdir()
    assert file.read_text() == "Step 1 | loss:1.5 lr:0.1 \nStep 2 | loss:1.25\n"
    assert "seed: 3" in (tmp_path / "torchtune_config.yaml").read_text()


def test_no_output_folder_is_left_to_the_checkpointer_to_refuse():
    DiskLogger(None).log_config(OmegaConf.create({"output_dir": None}))
