// Plays the server's stream in a video element. Takes an offer from the server and answers it.
// Connects again when the server has gone. `show` receives the state, '' while connected.
async function play(video, show) {
  const again = () => setTimeout(play, 2000, video, show);
  const connection = new RTCPeerConnection();
  const stream = new MediaStream();
  connection.ontrack = event => {
    stream.addTrack(event.track);
    video.srcObject = stream;
  };
  connection.onconnectionstatechange = () => {
    show(connection.connectionState == "connected" ? "" : connection.connectionState);
    if (["failed", "disconnected"].includes(connection.connectionState)) {
      connection.close();
      again();
    }
  };
  try {
    const response = await fetch("offer", {method: "POST"});
    if (!response.ok) throw new Error(await response.text());
    const {id, sdp} = await response.json();
    await connection.setRemoteDescription({type: "offer", sdp});
    await connection.setLocalDescription();
    if (connection.iceGatheringState != "complete") {
      await new Promise(done => connection.onicegatheringstatechange =
        () => connection.iceGatheringState == "complete" && done());
    }
    await fetch("answer/" + id, {method: "POST", body: connection.localDescription.sdp});
  } catch (error) {
    connection.close();
    show(error.message);
    again();
  }
}
