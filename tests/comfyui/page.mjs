// ComfyUI's page in headless Chromium, for test_page.py and pictures.py: reads one JSON command a line, answers each with one JSON line.
// Needs playwright-core: the folder of the package in PLAYWRIGHT_CORE, or where node finds it; and a Chromium: its path in CHROMIUM.
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'

const { chromium } = createRequire(import.meta.url)(process.env.PLAYWRIGHT_CORE || 'playwright-core')
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium' })
const SECONDS = 1000
let page, problems

const commands = {
  // The page, ready for a person. What it asks of other hosts is refused at once: the tests need no network.
  async open({ url, width, height, scale }) {
    await page?.context().close()
    const context = await browser.newContext({ viewport: { width, height }, deviceScaleFactor: scale })
    await context.route(
      (asked) => asked.origin !== new URL(url).origin,
      (route) => route.abort()
    )
    // ComfyUI's own templates and blocks are hundreds, and none of the tests' business.
    await context.route('**/templates/index*.json', (route) => route.fulfill({ json: [] }))
    await context.route('**/global_subgraphs', async (route) => {
      const all = await (await route.fetch()).json()
      await route.fulfill({ json: Object.fromEntries(Object.entries(all).filter(([, block]) => block.source === 'custom_node')) })
    })
    page = await context.newPage()
    page.setDefaultTimeout(30 * SECONDS)
    problems = []
    page.on('console', (message) => message.type() === 'error' && problems.push({ text: message.text(), url: message.location().url }))
    page.on('pageerror', (error) => problems.push({ text: String(error), url: '' }))
    await page.goto(url)
    await page.waitForFunction(() => window.app?.vueAppReady && window.app.extensionManager, null, { timeout: 90 * SECONDS })
    await page.waitForFunction(() => !document.querySelector('.p-blockui-mask'))
  },

  // Console errors and exceptions since the last call.
  async problems() {
    return problems.splice(0)
  },

  // A file from the file manager, let go over the canvas, below the graph: some nodes take files themselves.
  async drop({ path, x = 700, y = 960 }) {
    const protocol = await page.context().newCDPSession(page)
    const data = { items: [], files: [path], dragOperationsMask: 1 }
    const before = await workflowName()
    for (const type of ['dragEnter', 'dragOver', 'drop']) await protocol.send('Input.dispatchDragEvent', { type, x, y, data })
    await anotherThan(before)
    await protocol.detach()
  },

  // A workflow as data, in a tab of its own.
  async load({ workflow }) {
    await page.evaluate((workflow) => window.app.loadGraphData(workflow), workflow)
    await settle()
  },

  // One node alone on an empty canvas.
  async alone({ type, width, height }) {
    await page.evaluate(([type, width, height]) => {
      // The page remembers widgets by their node's number, so each is given one that no node had.
      const last = window.app.graph.state.lastNodeId
      window.app.graph.clear()
      window.app.graph.state.lastNodeId = last
      const node = window.LiteGraph.createNode(type)
      node.pos = [0, 0]
      window.app.graph.add(node)
      Object.assign(window.app.canvas.ds, { scale: 1, offset: [150, 200] })
      if (width) node.setSize([width, height ?? node.computeSize()[1]])
    }, [type, width, height])
    await settle()
  },

  // What the graph shows: nodes with their widgets and sockets, and what has no room.
  async graph() {
    return page.evaluate(() => {
      const missing = (node) => !(node.type in window.LiteGraph.registered_node_types) && !node.isSubgraphNode?.()
      // A note holds its rendered text and the box to edit it in, which is not seen.
      const shown = ({ element }) => (element ? [element, ...element.children].filter((part) => part === element || part.tagName !== 'TEXTAREA') : [])
      const slot = ({ name, label, localized_name, type, link, hasErrors }) => ({
        name, label: label ?? localized_name ?? name, type, link, red: !!hasErrors
      })
      return window.app.graph.nodes.map((node) => ({
        id: node.id,
        type: node.type,
        title: node.getTitle(),
        missing: missing(node),
        red: !!node.has_errors,
        box: Array.from(node.getBounding()),
        size: Array.from(node.size),
        needs: Array.from(node.computeSize()),
        inputs: (node.inputs ?? []).map(slot),
        outputs: (node.outputs ?? []).map(slot),
        pictures: (node.imgs ?? []).map((image) => [image.naturalWidth, image.naturalHeight]),
        widgets: (node.widgets ?? []).map((widget) => ({
          name: widget.name,
          label: widget.label ?? widget.name,
          type: widget.type,
          value: widget.value,
          choices: Array.isArray(widget.options?.values) ? widget.options.values : null,
          hidden: !!widget.hidden,
          // A note or a prompt: its text, and whether all of it can be seen.
          text: widget.element?.innerText ?? null,
          // Where it lies in its node, and how high it is.
          place: [widget.y, widget.computedHeight ?? 0],
          cut: Math.max(0, ...shown(widget).map((element) => element.scrollHeight - element.clientHeight))
        }))
      }))
    })
  },

  async resize({ width, height }) {
    await page.setViewportSize({ width, height })
    await settle()
  },

  // How the graph lies in the window, in pixels: nodes with their titles, groups, and the page's own bars over them; and whether texts of nodes are drawn.
  async view() {
    return page.evaluate(() => {
      const { canvas, graph } = window.app
      const { scale, offset } = canvas.ds
      const onPage = ([left, top, wide, high]) => [(left + offset[0]) * scale, (top + offset[1]) * scale, (left + wide + offset[0]) * scale, (top + high + offset[1]) * scale]
      const bars = ['side-toolbar', 'topbar-workflow-tabs', 'action-bar-card', 'view-mode-toggle', 'zoom-controls-button'].map((id) => {
        const { left, top, right, bottom } = document.querySelector(`[data-testid="${id}"]`).getBoundingClientRect()
        return [left, top, right, bottom]
      })
      return {
        scale,
        readable: !canvas.low_quality,
        nodes: graph.nodes.map((node) => onPage(node.getBounding())),
        groups: graph.groups.map((group) => onPage(group.boundingRect)),
        bars
      }
    })
  },

  // What our nodes say: each text, by how much it is cut, and its words that are broken over two lines.
  async texts() {
    return page.evaluate(() =>
      [...document.querySelectorAll('.cogvideox15-text')].filter((element) => element.checkVisibility()).map((element) => {
        const broken = []
        const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT)
        while (walker.nextNode())
          for (const word of walker.currentNode.data.matchAll(/\S+/g)) {
            const range = document.createRange()
            range.setStart(walker.currentNode, word.index)
            range.setEnd(walker.currentNode, word.index + word[0].length)
            if (new Set([...range.getClientRects()].map((line) => Math.round(line.top))).size > 1) broken.push(word[0])
          }
        return { text: element.innerText, cut: element.scrollHeight - element.clientHeight, broken }
      })
    )
  },

  // A new node to the right of the only one, with its input at that one's output.
  async join({ type, output, input }) {
    await page.evaluate(([type, output, input]) => {
      const { graph } = window.app
      const [from] = graph.nodes
      const to = window.LiteGraph.createNode(type)
      to.pos = [from.pos[0] + from.size[0] + 60, from.pos[1]]
      graph.add(to)
      from.connect(from.findOutputSlot(output), to, to.findInputSlot(input))
    }, [type, output, input])
    await settle()
  },

  async set_widgets({ values }) {
    await page.evaluate((values) => {
      for (const node of window.app.graph.nodes)
        for (const widget of node.widgets ?? []) if (widget.name in values) widget.value = values[widget.name]
    }, values)
  },

  // What is on the screen over the canvas: dialogs, and the page's box of errors.
  async messages() {
    return page.evaluate(() =>
      [...document.querySelectorAll('[data-testid="error-overlay"], [role="dialog"], .p-toast-message')]
        .filter((element) => element.checkVisibility())
        .map((element) => element.innerText)
    )
  },

  // The whole graph as large as it fits and not larger than life, with a margin for the page's menus, or with none of them when `plain`.
  async fit({ plain = false } = {}) {
    await page.evaluate((plain) => {
      const { canvas, extensionManager, graph } = window.app
      if (plain !== extensionManager.focusMode) extensionManager.toggleFocusMode()
      canvas.deselectAll()
      const boxes = graph.nodes.map((node) => node.getBounding())
      const [x, y] = [0, 1].map((i) => Math.min(...boxes.map((box) => box[i])))
      const [right, bottom] = [0, 1].map((i) => Math.max(...boxes.map((box) => box[i] + box[i + 2])))
      const [left, top] = plain ? [20, 60] : [80, 110]
      const view = canvas.ds
      view.scale = Math.min(1, (innerWidth - left - 20) / (right - x), (innerHeight - top - 20) / (bottom - y))
      view.offset[0] = left / view.scale - x
      view.offset[1] = top / view.scale - y
      canvas.setDirty(true, true)
    }, plain)
    await settle()
  },

  // Tooltips as the mouse finds them: on every input, widget and output of the only node. {"inputs": {name: text}, "outputs": [text]}
  async tooltips() {
    const targets = await page.evaluate(() => {
      const node = window.app.graph.nodes[0]
      const widgets = (node.widgets ?? []).filter((widget) => !widget.element && !widget.hidden)
      const [left, top] = node.pos
      return {
        inputs: Object.fromEntries([
          ...node.inputs.flatMap((input, i) => (input.widget ? [] : [[input.name, Array.from(node.getInputPos(i))]])),
          ...widgets.map((widget) => [widget.name, [left + node.size[0] / 2, top + widget.last_y + 10]])
        ]),
        outputs: node.outputs.map((_, i) => Array.from(node.getOutputPos(i))),
        title: [left + node.size[0] / 2, top - 15]
      }
    })
    const found = { inputs: {}, outputs: [] }
    for (const [name, position] of Object.entries(targets.inputs)) found.inputs[name] = await tooltipAt(position)
    for (const position of targets.outputs) found.outputs.push(await tooltipAt(position))
    found.title = await tooltipAt(targets.title)
    return found
  },

  // The side panel's help of the first node of that type, opened with the node's own (i) button.
  async help({ type }) {
    const at = await page.evaluate((type) => {
      const node = window.app.graph.nodes.find((node) => node.type === type)
      return [node.pos[0] + 60, node.pos[1] - 15]
    }, type)
    await page.mouse.click(...(await onScreen(at)))
    const help = page.locator('.node-help-content .markdown-content')
    if (!(await page.locator('.node-help-content').isVisible())) await page.getByTestId('info-button').click()
    await help.waitFor()
    await page.waitForFunction(() => [...document.querySelectorAll('.node-help-content img')].every((image) => image.complete))
    return help.evaluate((element) => ({
      text: element.innerText,
      pictures: [...element.querySelectorAll('img')].map((image) => ({ src: image.getAttribute('src'), width: image.naturalWidth }))
    }))
  },

  // The pack's part of the template browser, once all of its cards have their pictures: {name: width of the picture}
  async templates({ module, count }) {
    await page.evaluate(() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates'))
    await page.locator('[role="dialog"]').getByText(module, { exact: true }).first().click()
    const cards = page.locator('[data-testid^="template-workflow-"]')
    await page.waitForFunction(
      (count) => document.querySelectorAll('[data-testid^="template-workflow-"]').length === count,
      count
    )
    const found = {}
    // A card has its picture only while it is within the window.
    for (const card of await cards.all()) {
      await card.scrollIntoViewIfNeeded()
      const picture = await card.locator('img').elementHandle()
      await page.waitForFunction((picture) => picture.complete && picture.naturalWidth, picture)
      const name = (await card.getAttribute('data-testid')).replace('template-workflow-', '')
      found[name] = await picture.evaluate((picture) => picture.naturalWidth)
    }
    return found
  },

  async open_template({ name }) {
    const before = await workflowName()
    const card = page.getByTestId(`template-workflow-${name}`)
    // Scrolled to, it gets its picture, which moves what is below.
    await card.scrollIntoViewIfNeeded()
    await card.locator('img').waitFor()
    await card.click()
    await anotherThan(before)
    await page.waitForFunction(() => !document.querySelector('[data-testid^="template-workflow-"]'))
  },

  // Finds a node by its name, as the search box that a double click on the canvas opens, and adds it. The new node's index.
  async add_by_search({ name }) {
    await page.evaluate(() => window.app.graph.clear())
    await page.mouse.dblclick(700, 500)
    await page.keyboard.type(name)
    await page.getByTestId('result-item').first().filter({ hasText: name }).waitFor()
    await page.getByTestId('result-item').first().click()
    // It hangs on the mouse until a click.
    await settle()
    await page.mouse.move(500, 250)
    await page.mouse.click(500, 250)
    await settle()
  },

  // Presses Run and waits for the end. What the page was told meanwhile, and what its nodes show now.
  async run({ seconds = 120 }) {
    await page.evaluate(() => {
      const seen = (window.seen = { progress: {}, previews: 0, end: null })
      window.forget?.()
      const listeners = {
        progress_state: ({ detail }) => {
          for (const [id, state] of Object.entries(detail.nodes)) (seen.progress[id] ??= []).push([state.value, state.max])
        },
        b_preview_with_metadata: () => seen.previews++,
        execution_success: () => (seen.end = 'success'),
        execution_error: () => (seen.end = 'error')
      }
      for (const [name, listener] of Object.entries(listeners)) window.app.api.addEventListener(name, listener)
      window.forget = () => Object.entries(listeners).forEach(([name, listener]) => window.app.api.removeEventListener(name, listener))
    })
    // That of a run before goes when this one begins.
    const before = page.getByTestId('error-overlay')
    const leaves = await before.count()
    await page.getByTestId('queue-button').click()
    if (leaves) await before.waitFor({ state: 'detached', timeout: 5 * SECONDS }).catch(() => {})
    await page.waitForFunction(
      () => window.seen.end || document.querySelector('[data-testid="error-overlay"]'),
      null,
      { timeout: seconds * SECONDS }
    )
    return page.evaluate(() => window.seen)
  },

  // The film on the node that saves: its size once it can be played.
  async video() {
    await page.waitForFunction(() => [...document.querySelectorAll('video')].some((video) => video.readyState >= 2))
    return page.evaluate(() => {
      const video = [...document.querySelectorAll('video')].find((video) => video.readyState >= 2)
      return { width: video.videoWidth, height: video.videoHeight, seconds: video.duration }
    })
  },

  // Waits for the pictures on a node, which come after what ran has ended.
  async pictures({ type }) {
    await page.waitForFunction((type) => window.app.graph.nodes.find((node) => node.type === type).imgs?.length, type)
  },

  // The error as the side panel has it, opened from the box of errors, with what its (i) buttons tell.
  async error_details() {
    await page.getByTestId('error-overlay-see-errors').click()
    const panel = page.getByTestId('properties-panel')
    await panel.waitFor()
    await settle()
    const more = panel.locator('button:has(i[class*="lucide--info"])')
    if (await more.count()) await more.first().click()
    await settle()
    return panel.innerText()
  },

  // Takes the page's offer to put other nodes in the place of missing ones.
  async replace_missing() {
    await page.getByTestId('error-overlay-see-errors').click()
    await page.getByRole('button', { name: 'Replace All' }).click()
    await page.waitForFunction(() => !window.app.graph.nodes.some((node) => !(node.type in window.LiteGraph.registered_node_types)))
    await settle()
  },

  // The graph as the page's Save writes it, and as it is queued.
  async save() {
    return page.evaluate(() => window.app.graph.serialize())
  },
  async prompt() {
    return page.evaluate(async () => (await window.app.graphToPrompt()).output)
  },

  async evaluate({ script, argument }) {
    return page.evaluate(`(${script})(${JSON.stringify(argument ?? null)})`)
  },

  // `clip` in pixels of the page, or the rectangle `around` in the graph's own units.
  async screenshot({ path, clip, around, format = 'png', quality }) {
    await settle()
    if (around) {
      const [left, top, wide, high] = around
      const [x, y] = await onScreen([left, top])
      const [right, bottom] = await onScreen([left + wide, top + high])
      clip = { x, y, width: right - x, height: bottom - y }
    }
    await page.screenshot({ path, clip, type: format, quality })
  }
}

// Two frames drawn, so that what was asked for is on the screen.
async function settle() {
  await page.evaluate(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50)))))
}

async function workflowName() {
  return page.evaluate(() => window.app.extensionManager.workflow.activeWorkflow?.path)
}

async function anotherThan(name) {
  await page.waitForFunction((name) => window.app.extensionManager.workflow.activeWorkflow?.path !== name, name)
  await page.waitForFunction(() => !window.app.configuringGraph)
  await settle()
}

// Where a point of the graph is on the page.
async function onScreen(point) {
  return page.evaluate(([x, y]) => {
    const { canvas, ds } = window.app.canvas
    const { left, top } = canvas.getBoundingClientRect()
    return [left + (x + ds.offset[0]) * ds.scale, top + (y + ds.offset[1]) * ds.scale]
  }, point)
}

async function tooltipAt(point) {
  const [x, y] = await onScreen(point)
  await page.mouse.move(x - 2, y)
  await page.mouse.move(x, y)
  const tooltip = page.locator('.node-tooltip')
  await tooltip.waitFor({ timeout: 2 * SECONDS }).catch(() => {})
  return (await tooltip.isVisible()) ? await tooltip.innerText() : ''
}

for await (const line of createInterface({ input: process.stdin })) {
  const { command, ...options } = JSON.parse(line)
  let answer
  try {
    answer = { result: (await commands[command](options)) ?? null }
  } catch (error) {
    answer = { error: String(error.stack ?? error) }
  }
  process.stdout.write(JSON.stringify(answer) + '\n')
}
await browser.close()
