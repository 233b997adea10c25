// What the pack adds to ComfyUI's page: colours of its own socket types, texts on its nodes that keep their words whole, and
// links of nodes that it stands in for.
import { app } from '../../scripts/app.js'

// Of the hues that core gives MODEL, CLIP and VAE, but darker: each stands out at 3 to 1 from the nodes of dark and of light palettes.
const COLOURS = {
  COGVIDEOX_MODEL: '#8F6FE8',
  COGVIDEOX_TEXT_ENCODER: '#978118',
  COGVIDEOX_VAE: '#E2504C'
}

// The page empties the colours of types that its palette does not know, each time a palette is loaded.
function keepColours(table) {
  for (const [type, ours] of Object.entries(COLOURS)) {
    let colour = table[type] || ours
    Object.defineProperty(table, type, {
      get: () => colour,
      set: (other) => (colour = other || ours),
      enumerable: true,
      configurable: true
    })
  }
}

// The page gives a text on a node three lines, whatever it says: our nodes grow until it can be read.
const THREE_LINES = 58
// What is longer scrolls: so much room the templates have for a report.
const LONGEST = 220
const BESIDE = 52
let ruler

function heightOf(text, width) {
  // What was wrong and is mended leaves a blank: of an empty text the page takes no notice.
  if (!text?.trim()) return 0
  if (!ruler) {
    ruler = document.createElement('div')
    ruler.className = 'cogvideox15-text text-xs whitespace-pre-line'
    ruler.style.cssText = 'position: fixed; left: -10000px; visibility: hidden'
    ruler.append(document.createElement('span'))
    document.body.append(ruler)
  }
  const asked = `${width}:${text}`
  if (ruler.asked !== asked) {
    ruler.asked = asked
    ruler.style.width = `${Math.max(width - BESIDE, 50)}px`
    ruler.firstChild.textContent = text
    ruler.measured = Math.min(Math.max(THREE_LINES, ruler.offsetHeight + 30), LONGEST)
  }
  return ruler.measured
}

// ComfyUI-CogVideoXWrapper's text encoder hands on its CLIP, from one prompt to the next. Where the page has put ours in its
// place, what came from it comes from where its own does: ours has no such output, and the page leaves the link there.
function handOn(node) {
  const links = node.graph?.links
  const own = links?.get(node.inputs[node.findInputSlot('text_encoder')]?.link)
  const output = own && node.graph.getNodeById(own.origin_id)?.outputs?.[own.origin_slot]
  for (const link of links?.values() ?? []) {
    if (!own || String(link.origin_id) !== String(node.id) || link.origin_slot < node.outputs.length) continue
    Object.assign(link, { origin_id: own.origin_id, origin_slot: own.origin_slot })
    output?.links?.push(link.id)
  }
  node.graph?.setDirtyCanvas(true, true)
}

app.registerExtension({
  name: 'CogVideoX-1.5',

  setup() {
    keepColours(app.canvas.default_connection_color_byType)
    keepColours(app.canvas.constructor.link_type_colors)
    const style = document.createElement('style')
    // The first rule is for nodes drawn by Vue, the rest for texts: the page breaks them within words, and scrolls
    // after 200 pixels in whatever room there is.
    style.textContent = `
      :root { ${Object.entries(COLOURS).map(([type, colour]) => `--color-datatype-${type}: ${colour};`).join(' ')} }
      .cogvideox15-text { max-height: none !important; padding-block: 0 !important; }
      .cogvideox15-text * { word-break: normal; overflow-wrap: anywhere; }`
    document.head.append(style)
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith('CogVideoX15')) return
    // Once the page has given it the links of the one that was missing.
    if (node.comfyClass === 'CogVideoX15TextEncode') setTimeout(() => handOn(node))
    const add = node.addCustomWidget
    node.addCustomWidget = function (widget) {
      if (widget?.type === 'progressText') {
        widget.props = { ...widget.props, class: 'cogvideox15-text' }
        widget.options.getMinHeight = () => heightOf(widget.value, node.size[0])
        // Where there is nothing to read any more, the node is as high as it was before it grew, unless it has been made
        // higher than it had to grow.
        const { setValue } = widget.options
        let height, needed
        widget.options.setValue = (text) => {
          if (!widget.value?.trim()) height = needed = node.size[1]
          needed = Math.max(needed, node.computeSize()[1])
          const grown = node.size[1] <= needed
          setValue(text)
          if (!text?.trim() && grown) node.setSize([node.size[0], Math.min(height, node.size[1])])
        }
      }
      return add.apply(this, arguments)
    }
  }
})
