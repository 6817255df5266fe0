"""Pictures of MuJoCo scenes without a screen, cheap enough for a CPU."""

import copy
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np

from errors import UserError


def pick_renderer() -> str:
    """Set MUJOCO_GL, which has to happen before mujoco is imported: EGL where it works, else OSMesa.

    Raises:
        UserError: neither works.
    """
    if "MUJOCO_GL" in os.environ or sys.platform != "linux":
        return os.environ.get("MUJOCO_GL", "the system's own")
    probe = "import mujoco; mujoco.GLContext(64, 64).make_current()"
    for backend in ("egl", "osmesa"):
        # In another process: a failed attempt cannot be undone in this one.
        environment = {**os.environ, "MUJOCO_GL": backend}
        if subprocess.run([sys.executable, "-c", probe], capture_output=True, env=environment).returncode == 0:
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise UserError("no library renders without a screen. Install one: apt-get install -y libegl1 libgl1 libosmesa6")


@dataclass
class Mount:
    """A camera of our own: on a body of the model (world stands still), where on it, where it looks and what is up.

    Vectors of three are in the body's frame, in metres; `fovy` is the vertical field of view in degrees.
    """

    body: str
    position: tuple
    forward: tuple
    up: tuple
    fovy: float


class Renderer:
    """Pictures of a model. Keep one per process: with EGL, closing one blacks out the others.

    The plain look leaves out what costs a CPU most: shadows, reflections, and details of meshes that are smaller than
    `detail`. It draws at twice the size and averages, which is faster on a CPU than the graphics library's antialiasing.
    Physics does not change: only a copy of the model is drawn.

    Args:
        model: a mujoco.MjModel.
        size: height in pixels.
        width: 0 for square pictures.
        look: plain, or full: as the scene's authors draw it.
        detail: in metres; 0 draws meshes whole.
    """

    def __init__(self, model, size: int, look: str, detail: float = 0.0, width: int = 0):
        import mujoco

        model = copy.copy(model)
        self.is_plain = look == "plain"
        width = width or size
        if self.is_plain:
            size = 2 * size
            width = 2 * width
            # The renderer allocates its buffers and uploads the meshes by these.
            model.vis.quality.offsamples = 0
            model.vis.quality.shadowsize = 0
            model.mat_reflectance[:] = 0
            if detail:
                coarsen_meshes(model, detail)
        model.vis.global_.offwidth = max(width, model.vis.global_.offwidth)
        model.vis.global_.offheight = max(size, model.vis.global_.offheight)
        self.model = model
        self.renderer = mujoco.Renderer(model, size, width)
        if self.is_plain:
            self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            self.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0

    def picture(self, data, camera: str | Mount, draw_more=None) -> np.ndarray:
        """(H, W, 3) uint8. `draw_more(scene)` adds geoms to the scene.

        Raises:
            UserError: the renderer gives black images.
        """
        if isinstance(camera, Mount):
            self.renderer.update_scene(data)
            self._look_from(data, camera)
        else:
            self.renderer.update_scene(data, camera)
        if draw_more is not None:
            draw_more(self.renderer.scene)
        image = self.renderer.render()
        if image.mean() < 1:
            raise UserError("the renderer gives black images. Set MUJOCO_GL=osmesa and try again")
        if self.is_plain:
            image = halved(image)
        return image

    def _look_from(self, data, mount: Mount) -> None:
        body = data.body(mount.body)
        rotation = body.xmat.reshape(3, 3)
        for eye in self.renderer.scene.camera:  # the left eye's and the right one's, both in the middle
            eye.pos = body.xpos + rotation @ mount.position
            eye.forward = rotation @ mount.forward
            eye.up = rotation @ mount.up
            eye.frustum_top = eye.frustum_near * np.tan(np.radians(mount.fovy) / 2)
            eye.frustum_bottom = -eye.frustum_top
            eye.frustum_center = 0
            eye.frustum_width = 0  # as wide as high

    def close(self) -> None:
        self.renderer.close()


def halved(image: np.ndarray) -> np.ndarray:
    """An image (2 H, 2 W, 3) uint8 at half the size: each pixel is the mean of four."""
    rows = image[0::2].astype(np.uint16) + image[1::2]  # (H, 2 W, 3)
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) // 4).astype(np.uint8)


def coarsen_meshes(model, cell: float) -> None:
    """Merge the vertices of a mesh that share a cube of `cell` metres, and drop the faces that collapse.

    Source: vertex clustering, Rossignac and Borrel, "Multi-resolution 3D approximations for rendering" (1993).
    """
    for mesh in range(model.nmesh):
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        faces = slice(model.mesh_faceadr[mesh], model.mesh_faceadr[mesh] + model.mesh_facenum[mesh])
        _, first, cluster = np.unique(np.floor(vertices / cell), axis=0, return_index=True, return_inverse=True)
        merged = first[cluster.reshape(-1)][model.mesh_face[faces]]  # (faces, 3): one vertex stands for its cluster
        is_face = (merged != np.roll(merged, 1, axis=1)).all(1)
        _, unique = np.unique(np.sort(merged, axis=1), axis=0, return_index=True)
        kept = unique[is_face[unique]]
        end = faces.start + len(kept)
        for name in ("mesh_face", "mesh_facenormal", "mesh_facetexcoord"):
            array = getattr(model, name)
            values = merged if name == "mesh_face" else array[faces]
            array[faces.start : end] = values[kept]
        model.mesh_facenum[mesh] = len(kept)
