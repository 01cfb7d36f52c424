// A page that is opened from disk may start no worker, but search asks for one: there, a hidden
// frame does a worker's work.
if (location.protocol === "file:") {
  const load = (page, url) =>
    new Promise((done) => {
      const script = page.createElement("script")
      script.onload = done
      script.src = url
      page.head.appendChild(script)
    })

  class IFrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      this.inside = frame.contentWindow
      // an empty page of our own, before a browser puts another in its place
      this.inside.document.open()
      this.inside.document.write("<!doctype html><head></head>")
      this.inside.document.close()
      this.inside.postMessage = (data) =>
        this.dispatchEvent(new MessageEvent("message", { data }))
      this.inside.importScripts = (...urls) =>
        urls.reduce((before, next) => before.then(() => load(this.inside.document, next)), Promise.resolve())
      this.ready = load(this.inside.document, url)
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }

  window.IFrameWorker = window.Worker = IFrameWorker
}
